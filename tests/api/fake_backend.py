"""A backend in this process that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from ridgewalk.api.backend import BackendError, Sequence, ServedModel, TokenEvent
from ridgewalk.engine.step import TokenLogprobs

Step = list[TokenEvent] | BackendError | asyncio.Event
"""What comes next of a stream: events, an error, or nothing until the event is set."""


@dataclass
class FakeBackend:
    """Answers every request by ``script``, or with `say` of ``text``."""

    models: Mapping[str, ServedModel]
    text: str = "Hello there."
    script: Callable[[ServedModel, list[Sequence]], list[Step]] | None = None
    calls: list[tuple[str, str, list[Sequence]]] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    missing: str | None = None
    scrape_timeouts: list[float] = field(default_factory=list)

    def generate(self, model: str, request_id: str, sequences: list[Sequence]) -> FakeStream:
        served = self.models[model]
        self.calls.append((model, request_id, sequences))
        steps = self.script(served, sequences) if self.script else say(served, sequences, self.text)
        stream = FakeStream(steps, len(sequences))
        self.streams.append(stream)
        return stream

    def not_ready(self) -> str | None:
        return self.missing

    async def metrics(self, timeout_s: float) -> bytes:
        self.scrape_timeouts.append(timeout_s)
        return b"ridgewalk_up 1\n"


class FakeStream:
    """Plays a script; a sequence that the reader finished gets its last event at once and no more tokens."""

    def __init__(self, steps: list[Step], num_sequences: int) -> None:
        self._steps = steps
        self._open = set(range(num_sequences))
        self._finished: dict[int, str] = {}
        self.finish_calls: list[tuple[int, str]] = []
        self.closed = asyncio.Event()
        self.waiting = asyncio.Event()
        self.num_read = 0

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        for step in self._steps:
            if isinstance(step, BackendError):
                raise step
            if isinstance(step, asyncio.Event):
                self.waiting.set()
                await step.wait()
                continue
            events = [event for event in step if event.index in self._open and event.index not in self._finished]
            events += self._last_events()
            self._open -= {event.index for event in events if event.finish_reason is not None}
            if events:
                self.num_read += 1
                yield events
        if last := self._last_events():
            yield last

    def _last_events(self) -> list[TokenEvent]:
        ended = [(index, reason) for index, reason in self._finished.items() if index in self._open]
        self._open -= {index for index, _ in ended}
        return [TokenEvent(index, [], finish_reason=reason) for index, reason in ended]

    def finish(self, index: int, reason: str) -> None:
        self.finish_calls.append((index, reason))
        self._finished[index] = reason

    async def aclose(self) -> None:
        await asyncio.sleep(0)  # as a real one, which sends a message: a cancelled reader must see it through
        self.closed.set()


def say(
    model: ServedModel, sequences: list[Sequence], text: str, per_event: int = 1, late_end: bool = False
) -> list[Step]:
    """Every sequence says ``text`` and its EOS, ``per_event`` tokens at a time; ``late_end``: the end comes apart."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    return speak(model, sequences, [*ids, model.eos_token_ids[0]], per_event, late_end)


def speak(
    model: ServedModel, sequences: list[Sequence], token_ids: list[int], per_event: int = 1, late_end: bool = False
) -> list[Step]:
    """As `say`, of token ids."""
    steps: list[Step] = []
    longest = max(min(len(token_ids), sequence.sampling.max_tokens) for sequence in sequences)
    for start in range(0, longest, per_event):
        events = []
        for index, sequence in enumerate(sequences):
            limit = min(len(token_ids), sequence.sampling.max_tokens)
            ids = token_ids[start : min(start + per_event, limit)]
            if ids:
                is_last = start + per_event >= limit
                stop = ids[-1] if ids[-1] in sequence.sampling.stop_token_ids else None
                end = {"finish_reason": "length" if stop is None else "stop", "stop_token_id": stop} if is_last else {}
                logprobs = _logprobs(ids, sequence.sampling.logprobs)
                cached = 16 if start == 0 else 0
                if is_last and late_end:
                    events += [TokenEvent(index, ids, logprobs, cached), TokenEvent(index, [], **end)]
                else:
                    events.append(TokenEvent(index, ids, logprobs, cached, **end))
        steps.append(events)
    return steps


def _logprobs(token_ids: list[int], top: int | None) -> list[TokenLogprobs] | None:
    if top is None:
        return None
    alternatives = [(token_id + 1, -2.0 - rank) for rank, token_id in enumerate(range(top))]
    return [TokenLogprobs(-0.5, 1, [(token_id, -0.5), *alternatives][:top]) for token_id in token_ids]
