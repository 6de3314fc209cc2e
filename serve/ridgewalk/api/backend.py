"""What the HTTP surface needs of whatever computes tokens. Tests use an in-process one, the service Ray Serve."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ridgewalk.api.chat_template import ChatTemplate
from ridgewalk.api.tokenizer import Tokenizer
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import TokenLogprobs
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo


@dataclass(frozen=True)
class ServedModel:
    """One model as clients see it."""

    name: str  # the id in /v1/models
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None: the model has none, chat is refused with 400
    max_model_len: int  # prompt + output tokens
    vocab_size: int  # of the model: token ids at or over it are refused
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float] = field(default_factory=dict)  # of generation_config.json: temperature, ...
    created: int = 0  # unix seconds, for /v1/models
    reasoning_tags: tuple[str, str] | None = ("<think>", "</think>")  # None: a chat's output is not parted
    slo: LatencySlo = NO_SLO  # of requests that ask for none


@dataclass(frozen=True)
class Sequence:
    """One choice to generate. A request's sequences are numbered by their place in the list."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    slo: LatencySlo = NO_SLO


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one sequence, or its end (or both)."""

    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # parallel to token_ids when the sequence asked for them
    num_cached_tokens: int = 0
    finish_reason: str | None = None  # stop | length | abort: the last event of this sequence
    stop_token_id: int | None = None


class BackendError(Exception):
    """The backend refused or lost the request; the message is a sentence for the client."""

    def __init__(self, message: str, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status  # HTTP status: 429 overloaded, 400 can never fit, 503 no live replica ...
        self.retry_after_s = retry_after_s


class TokenStream(Protocol):
    """Tokens of one request as they come. Iterating ends after every sequence's last event."""

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        """Batches of events: all that had arrived when the reader came back. Raises `BackendError`."""
        ...

    def finish(self, index: int, reason: str) -> None:
        """End one sequence from this side: ``stop`` (a stop string was seen). Its last event still comes."""
        ...

    async def aclose(self) -> None:
        """The client is gone or all is read: aborts what still runs. Idempotent."""
        ...


class TokenSource(Protocol):
    """What generates."""

    def generate(self, model: str, request_id: str, sequences: list[Sequence]) -> TokenStream:
        """Start generating. Errors come out of the stream."""
        ...


class Backend(TokenSource, Protocol):
    """Everything the API layer asks for."""

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """Served models by name, in the order of the configuration."""
        ...

    def not_ready(self) -> str | None:
        """None when every model has a live replica, else a sentence saying what is missing."""
        ...

    async def metrics(self, timeout_s: float) -> bytes:
        """The whole service's metrics in Prometheus text format, of what answers within ``timeout_s``."""
        ...
