"""``POST /tokenize`` and ``POST /detokenize``, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ridgewalk.api.body import decode_body, read_body
from ridgewalk.api.chat_handler import render_chat
from ridgewalk.api.chat_protocol import Messages
from ridgewalk.api.errors import ApiError
from ridgewalk.api.http import json_response
from ridgewalk.api.sampling_fields import TokenId, check_token_id
from ridgewalk.api.service import Service, encode_all, off_loop


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Either a ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # by default true for a prompt, false for messages
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeReply(msgspec.Struct):
    """The tokens of a prompt, and how many fit into the model's context."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Token ids."""

    model: str | None = None
    tokens: list[TokenId]


class TokenizeHandler:
    """Both directions, for clients that count tokens."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tokenize = msgspec.json.Decoder(TokenizeRequest)
        self._detokenize = msgspec.json.Decoder(DetokenizeRequest)

    async def tokenize(self, request: Request) -> Response:
        """Raises `ApiError`."""
        call = decode_body(self._tokenize, await read_body(request, self._service.max_body_bytes))
        model = self._service.model(request, call.model)
        if (call.prompt is None) == (call.messages is None):
            raise ApiError("Exactly one of `prompt` and `messages` is required.", param="prompt")
        if call.messages is not None:
            add_generation_prompt = call.add_generation_prompt is not False
            text = await render_chat(model, call.messages, add_generation_prompt, call.chat_template_kwargs)
        else:
            text = call.prompt or ""
        add_special_tokens = call.messages is None if call.add_special_tokens is None else call.add_special_tokens
        (tokens,) = await encode_all(model.tokenizer, [text], add_special_tokens)
        strings = [model.tokenizer.token_text(token) for token in tokens] if call.return_token_strs else None
        return json_response(msgspec.json.encode(TokenizeReply(len(tokens), model.max_model_len, tokens, strings)))

    async def detokenize(self, request: Request) -> Response:
        """Raises `ApiError`."""
        call = decode_body(self._detokenize, await read_body(request, self._service.max_body_bytes))
        model = self._service.model(request, call.model)
        if call.tokens:
            check_token_id(max(call.tokens), model, "tokens")
        text = await off_loop(lambda: model.tokenizer.decode(call.tokens, skip_special_tokens=False), len(call.tokens))
        return json_response(msgspec.json.encode({"prompt": text}))
