"""What a client may ask of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ridgewalk.api.backend import ServedModel
from ridgewalk.api.chat_template import RESERVED_NAMES, ChatTemplate
from ridgewalk.api.errors import ApiError, not_supported
from ridgewalk.api.sampling_fields import Count, SamplingFields, check_fields, refuse

ROLES = ("system", "developer", "user", "assistant")


class ContentPart(msgspec.Struct, kw_only=True):
    """One part of a message's content; only text is served."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of the conversation so far."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None  # of an assistant's earlier turn: templates may show it or drop it
    reasoning: str | None = None  # the same by its newer name
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]


class ChatRequest(SamplingFields, kw_only=True):
    """Body of the request."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    max_reasoning_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None

    # Not built: refused when given.
    audio: Any = None
    chat_template: Any = None
    continue_final_message: Any = None
    documents: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    tool_choice: Any = None
    tools: Any = None
    web_search_options: Any = None

    @property
    def output_limit(self) -> int | None:
        """Output tokens asked for, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


_REFUSED = (
    "audio",
    "chat_template",
    "continue_final_message",
    "documents",
    "functions",
    "tools",
    "web_search_options",
)


def check_chat_request(request: ChatRequest, model: ServedModel) -> None:
    """Raise `ApiError` for what is not built or cannot be."""
    check_fields(request, model)
    refuse(request, _REFUSED)
    for name in ("tool_choice", "function_call"):
        if getattr(request, name) not in (None, "none"):
            raise not_supported(f"`{name}` other than none", name)
    if request.modalities not in (None, [], ["text"]):
        raise not_supported("`modalities` other than text", "modalities")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("`top_logprobs` is only allowed with `logprobs` set to true.", param="top_logprobs")


def check_template_kwargs(extra: dict[str, Any] | None) -> None:
    """Raise `ApiError` when ``chat_template_kwargs`` would replace what the server itself tells the template."""
    for name in extra or {}:
        if name in RESERVED_NAMES:
            raise ApiError(f"`chat_template_kwargs` must not set `{name}`.", param="chat_template_kwargs")


def template_messages(messages: list[ChatMessage], template: ChatTemplate) -> list[dict[str, Any]]:
    """The conversation as templates expect it: plain dicts, content as one string. Raises `ApiError`."""
    return [_template_message(message, f"messages[{i}]", template) for i, message in enumerate(messages)]


def _template_message(message: ChatMessage, param: str, template: ChatTemplate) -> dict[str, Any]:
    role = message.role
    if role in ("tool", "function"):
        raise not_supported("A message of a tool", f"{param}.role")
    if role not in ROLES:
        raise ApiError(
            f"`{param}.role` must be one of {', '.join(ROLES)}, not `{role[:40]}`.",
            param=f"{param}.role",
            code="invalid_value",
        )
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name) not in (None, []):
            raise not_supported(f"`{name}` in a message", f"{param}.{name}")
    if role == "developer" and not template.knows_role("developer"):
        role = "system"
    result: dict[str, Any] = {"role": role, "content": _text(message, param)}
    if message.name is not None:
        result["name"] = message.name
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if reasoning is not None:
        result |= {"reasoning_content": reasoning, "reasoning": reasoning}
    return result


def _text(message: ChatMessage, param: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return ""  # it may have had nothing but reasoning
        raise ApiError(f"`{param}.content` must be text.", param=f"{param}.content", code="invalid_value")
    for i, part in enumerate(content):
        if part.type != "text":
            raise not_supported(f"Content of type `{part.type[:40]}`", f"{param}.content[{i}]")
        if part.text is None:
            raise ApiError(f"`{param}.content[{i}].text` is required.", param=f"{param}.content[{i}].text")
    return "\n".join(part.text or "" for part in content)
