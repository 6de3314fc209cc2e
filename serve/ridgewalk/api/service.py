"""What all handlers share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from ridgewalk.api.backend import Backend, ServedModel
from ridgewalk.api.errors import ApiError
from ridgewalk.api.observer import NullObserver, RequestObserver
from ridgewalk.api.open_replies import OpenReplies
from ridgewalk.api.tokenizer import Tokenizer

T = TypeVar("T")

LONG_TEXT_CHARS = 4_000
"""Texts over this are rendered and tokenized in a thread: the event loop has streams to serve."""


@dataclass(frozen=True)
class Service:
    """The backend, and how this process was told to serve it."""

    backend: Backend
    max_body_bytes: int
    version: str
    observer: RequestObserver = field(default_factory=NullObserver)
    clock: Callable[[], float] = time.perf_counter
    wall_clock: Callable[[], float] = time.time
    open_replies: OpenReplies = field(default_factory=OpenReplies)

    def model(self, request: Request, name: str | None) -> ServedModel:
        """The model that a request names; the only one, if it names none. Raises `ApiError`."""
        models = self.backend.models
        if name is None:
            if len(models) != 1:
                raise ApiError(
                    f"`model` is required: this server serves {', '.join(models) or 'no model yet'}.",
                    param="model",
                    code="missing_required_parameter",
                )
            name = next(iter(models))
        if name not in models:
            raise ApiError(
                f"The model `{name[:200]}` is not served here.", status=404, param="model", code="model_not_found"
            )
        request.state.served_model = name  # for the metrics of errors
        return models[name]


async def off_loop(function: Callable[[], T], num_chars: int) -> T:
    """Run a function of a text, in a thread if the text is long."""
    if num_chars <= LONG_TEXT_CHARS:
        return function()
    return await asyncio.to_thread(function)


async def encode_all(tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text."""
    return await off_loop(
        lambda: [tokenizer.encode(text, add_special_tokens) for text in texts], sum(len(text) for text in texts)
    )
