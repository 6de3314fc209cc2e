"""What a client may ask of ``/v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from ridgewalk.api.backend import ServedModel
from ridgewalk.api.errors import ApiError, not_supported
from ridgewalk.api.sampling_fields import SamplingFields, TokenId, check_fields, check_token_id, refuse

DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 1024


class CompletionRequest(SamplingFields, kw_only=True):
    """Body of the request."""

    prompt: str | list[TokenId | str | list[TokenId]]
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None  # 0: nothing but the prompt, with `echo`
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    # Not built: refused when given.
    max_reasoning_tokens: Any = None  # a chat's: here nothing tells where thinking begins
    prompt_embeds: Any = None
    suffix: Any = None


def check_completion_request(request: CompletionRequest, model: ServedModel) -> None:
    """Raise `ApiError` for what is not built or cannot be."""
    check_fields(request, model)
    refuse(request, ("max_reasoning_tokens", "prompt_embeds"))
    if request.suffix not in (None, ""):
        raise not_supported("`suffix`", "suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise not_supported("`best_of` other than `n`", "best_of")
    if request.echo and request.logprobs is not None:
        raise not_supported("`echo` together with `logprobs`", "logprobs")


def prompts(request: CompletionRequest, model: ServedModel) -> list[str | list[int]]:
    """The prompts of the request, each a text or token ids. Raises `ApiError`."""
    if isinstance(request.prompt, str):
        return [request.prompt]
    if not request.prompt:
        raise _invalid("`prompt` must not be empty.")
    token_ids = [item for item in request.prompt if isinstance(item, int)]
    texts = [item for item in request.prompt if isinstance(item, str)]
    lists = [item for item in request.prompt if isinstance(item, list)]
    if token_ids:
        lists.append(token_ids)
    if max(len(token_ids), len(texts), len(lists) - bool(token_ids)) < len(request.prompt):
        raise _invalid("`prompt` must be a text, token ids, a list of texts, or a list of lists of token ids.")
    for ids in lists:
        if not ids:
            raise _invalid("`prompt` must not contain an empty list.")
        check_token_id(max(ids), model, "prompt")
    return [*texts, *lists]


def _invalid(message: str) -> ApiError:
    return ApiError(message, param="prompt", code="invalid_value")
