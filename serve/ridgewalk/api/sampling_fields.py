"""The request fields that chat and plain completions share, and the `SamplingParams` they amount to."""

from __future__ import annotations

import random
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ridgewalk.api.backend import ServedModel
from ridgewalk.api.errors import ApiError, not_supported
from ridgewalk.engine.sampling import ReasoningBudget, SamplingParams

MAX_N = 128
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_CHARS = 512
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024

_SEED_MASK = 2**63 - 1
_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, as in splitmix64: seeds of choices lie far apart
_GREEDY_BELOW = 1e-5  # dividing logits by less would overflow

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream says besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields of both requests; None is "not given". Fields that are not listed are ignored."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    return_token_ids: bool | None = None

    # Known to vLLM's clients and not built: refused when given, rather than ignored.
    allowed_token_ids: Any = None
    bad_words: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    prompt_logprobs: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


_REFUSED = (
    "allowed_token_ids",
    "bad_words",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "prompt_logprobs",
    "structured_outputs",
    "truncate_prompt_tokens",
    "use_beam_search",
)


def refuse(fields: msgspec.Struct, names: tuple[str, ...]) -> None:
    """Raise `ApiError` if any of these fields asks for something; null, false and empty ones ask for nothing."""
    for name in names:
        value = getattr(fields, name)
        if value is not None and value is not False and value != [] and value != {}:
            raise not_supported(f"`{name}`", name)


def check_fields(fields: SamplingFields, model: ServedModel) -> None:
    """Raise `ApiError` for what the types of the fields cannot say."""
    refuse(fields, _REFUSED)
    form = fields.response_format
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        raise not_supported("`response_format` other than text", "response_format")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError("`stream_options` is only allowed with `stream` set to true.", param="stream_options")
    _check_stop_strings(fields.stop_strings)
    for token_id in fields.stop_token_ids or ():
        check_token_id(token_id, model, "stop_token_ids")


def check_token_id(token_id: int, model: ServedModel, param: str) -> None:
    """Raise `ApiError` for an id that the model has no token for."""
    if not 0 <= token_id < model.vocab_size:
        raise ApiError(
            f"Token id {token_id} in `{param}` is not in the model's vocabulary of {model.vocab_size} tokens.",
            param=param,
            code="invalid_token_id",
        )


def output_limit(
    model: ServedModel, prompt_tokens: int, asked: int | None, default: int | None, prompt_param: str, limit_param: str
) -> int:
    """Output tokens that a sequence may have: ``asked``, or else what is left of the context, but ``default`` at most.

    Raises `ApiError` with code ``context_length_exceeded`` when prompt and output do not fit.
    """
    left = model.max_model_len - prompt_tokens
    if left >= (1 if asked is None else asked):
        return min(left, default or left) if asked is None else asked
    asks = f"{prompt_tokens} tokens of prompt" + (f" and {asked} of output (`{limit_param}`)" if asked else "")
    raise ApiError(
        f"The context of model {model.name} holds {model.max_model_len} tokens, prompt and output together, "
        f"but the request asks for {asks}.",
        param=limit_param if left > 0 else prompt_param,
        code="context_length_exceeded",
    )


def sampling_params(
    fields: SamplingFields,
    model: ServedModel,
    max_tokens: int,
    logprobs: int | None,
    reasoning: ReasoningBudget | None = None,
    reasoning_effort: str = "",
) -> list[SamplingParams]:
    """Sampling of each of the ``n`` choices of one prompt; they differ in their seed only."""
    if (fields.min_tokens or 0) > max_tokens:
        raise ApiError(
            f"`min_tokens` ({fields.min_tokens}) must not be over the {max_tokens} output tokens of the request.",
            param="min_tokens",
        )
    defaults = model.default_sampling

    def pick(name: str, off: float) -> float:
        given = getattr(fields, name)
        return given if given is not None else defaults.get(name, off)

    temperature, top_p, top_k = pick("temperature", 1.0), pick("top_p", 1.0), int(pick("top_k", 0))
    if top_p == 0:
        top_p, top_k = 1.0, 1  # OpenAI allows it: nothing but the most probable token
    stops = () if fields.ignore_eos else model.eos_token_ids
    first = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens or 0,
        temperature=0.0 if temperature < _GREEDY_BELOW else float(temperature),
        top_p=float(top_p),
        top_k=top_k if 0 < top_k < model.vocab_size else 0,
        min_p=float(pick("min_p", 0.0)),
        repetition_penalty=float(pick("repetition_penalty", 1.0)),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        seed=random.getrandbits(63) if fields.seed is None else fields.seed & _SEED_MASK,
        stop_token_ids=tuple(dict.fromkeys((*stops, *(fields.stop_token_ids or ())))),
        logprobs=logprobs,
        logit_bias=_logit_bias(fields.logit_bias or {}, model),
        reasoning=reasoning,
        reasoning_effort=reasoning_effort,
    )
    return [
        msgspec.structs.replace(first, seed=(first.seed + choice * _SEED_STRIDE) & _SEED_MASK)
        for choice in range(fields.n or 1)
    ]


def _logit_bias(bias: dict[str, float], model: ServedModel) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise ApiError(f"The keys of `logit_bias` must be token ids, not `{key[:40]}`.", param="logit_bias")
        check_token_id(int(key), model, "logit_bias")
        pairs.append((int(key), value))
    return tuple(pairs)


def _check_stop_strings(stops: list[str]) -> None:
    if len(stops) > MAX_STOP_STRINGS:
        raise ApiError(f"`stop` holds {len(stops)} strings; the limit is {MAX_STOP_STRINGS}.", param="stop")
    if any(not stop for stop in stops):
        raise ApiError("`stop` must not contain the empty string.", param="stop")
    if any(len(stop) > MAX_STOP_STRING_CHARS for stop in stops):
        raise ApiError(f"A string in `stop` has over {MAX_STOP_STRING_CHARS} characters.", param="stop")
