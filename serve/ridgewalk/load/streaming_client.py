"""One streamed chat completion, timed token by token as a user sees it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec


class RequestFailed(RuntimeError):
    """The endpoint refused the request or broke off; the message is its own."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    text: str | None = None  # of plain completions
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


@dataclass
class Answer:
    """What came back. Times in seconds; the gaps are between chunks of the stream."""

    reasoning: str = ""
    content: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    time_to_first_token: float = 0.0
    total_time: float = 0.0
    gaps: list[float] = field(default_factory=list)


_decoder = msgspec.json.Decoder(_Chunk)


async def stream_completion(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    on_text: Callable[[str, bool], None] | None = None,
) -> Answer:
    """POST ``body`` with streaming and exact usage switched on, and read it to the end.

    ``on_text(text, is_reasoning)`` is called for each piece of text.

    Raises:
        RequestFailed: an error status, an error event, or a stream without an end.
    """
    answer = Answer()
    started = last = time.perf_counter()
    payload = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post(url, json=payload) as response:
        if response.status != 200:
            raise RequestFailed(f"{response.status}: {(await response.text())[:500]}")
        async for event in _events(response):
            chunk = _decoder.decode(event)
            if chunk.error is not None:
                raise RequestFailed(str(chunk.error))
            if _take(answer, chunk, on_text):
                now = time.perf_counter()
                if answer.time_to_first_token == 0.0:
                    answer.time_to_first_token = now - started
                else:
                    answer.gaps.append(now - last)
                last = now
    answer.total_time = time.perf_counter() - started
    if answer.finish_reason is None:
        raise RequestFailed("the stream ended without a finish_reason")
    return answer


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The JSON of each event of a stream. Cheaper than reading lines: client and service often share cores."""
    rest = b""
    async for data in response.content.iter_any():
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and not event.startswith(b"data: [DONE]"):
                yield event[6:]


def _take(answer: Answer, chunk: _Chunk, on_text: Callable[[str, bool], None] | None) -> bool:
    """Add a chunk to the answer; True when it brought text."""
    if chunk.usage is not None:
        answer.prompt_tokens = chunk.usage.prompt_tokens
        answer.completion_tokens = chunk.usage.completion_tokens
    brought = False
    for choice in chunk.choices:
        answer.finish_reason = choice.finish_reason or answer.finish_reason
        content = choice.delta.content or choice.text
        for text, is_reasoning in ((choice.delta.reasoning_content, True), (content, False)):
            if not text:
                continue
            brought = True
            if is_reasoning:
                answer.reasoning += text
            else:
                answer.content += text
            if on_text is not None:
                on_text(text, is_reasoning)
    return brought
