"""One HTTP request's sequences between backend and client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence

from ridgewalk.api import backend
from ridgewalk.api.backend import BackendError, ServedModel, TokenEvent, TokenSource
from ridgewalk.api.observer import RequestObserver
from ridgewalk.api.output import OutputDelta, OutputOptions, SequenceOutput
from ridgewalk.api.usage import Usage

_COMPLETE = ("stop", "length")  # OpenAI has no word for a sequence that the server gave up


class Generation:
    """``n`` choices of each prompt, numbered prompt by prompt as OpenAI does."""

    def __init__(
        self,
        source: TokenSource,
        model: ServedModel,
        request_id: str,
        sequences: Sequence[backend.Sequence],
        n: int,
        options: OutputOptions,
        *,
        prompt: str = "",
        observer: RequestObserver,
        clock: Callable[[], float],
        started: float,
    ) -> None:
        """``prompt``: the rendered chat; ``started``: when the request came, by ``clock``."""
        self.model = model
        self.request_id = request_id
        self.n = n
        self.sequences = list(sequences)
        self.observer = observer
        self._source = source
        self._clock = clock
        self._started = started
        self._outputs = [SequenceOutput(i, model, s, options, prompt) for i, s in enumerate(sequences)]
        self._last_token: list[float | None] = [None] * len(self._outputs)
        self._seen_token = False

    @property
    def num_choices(self) -> int:
        """Sequences in all."""
        return len(self._outputs)

    def prompt_token_ids(self, index: int) -> list[int]:
        """The prompt of a choice."""
        return self.sequences[index].prompt_token_ids

    def usage(self) -> Usage:
        """Tokens so far."""
        firsts = range(0, self.num_choices, self.n)
        return Usage.of(
            prompt=sum(len(self.prompt_token_ids(i)) for i in firsts),
            completion=sum(output.num_tokens for output in self._outputs),
            cached=sum(self._outputs[i].num_cached_tokens for i in firsts),
            reasoning=sum(output.num_reasoning_tokens for output in self._outputs),
        )

    async def deltas(self) -> AsyncGenerator[list[OutputDelta], None]:
        """Batches of what is new, until every choice has ended. Raises `BackendError`.

        Close it (``contextlib.aclosing``) when the client leaves: that aborts what still runs.
        """
        stream = self._source.generate(self.model.name, self.request_id, self.sequences)
        try:
            async for events in stream:
                deltas = [delta for event in events if (delta := self._take(event, stream)) is not None]
                if deltas:
                    yield deltas
        except BackendError:
            if not self._is_complete:  # else it came late: nothing is missing
                raise
        finally:
            await stream.aclose()
        if not self._is_complete:
            raise BackendError("The answer broke off before its end.", status=503)

    @property
    def _is_complete(self) -> bool:
        return all(output.finish_reason in _COMPLETE for output in self._outputs)

    def _take(self, event: TokenEvent, stream: backend.TokenStream) -> OutputDelta | None:
        output = self._outputs[event.index]
        delta = output.push(event)
        if delta is None:
            return None
        if delta.finish_reason is not None and delta.finish_reason not in _COMPLETE:
            raise BackendError("The server ended the request before its answer was complete.", status=503)
        now = self._clock()
        if delta.token_ids:
            self._observe_tokens(event.index, len(delta.token_ids), now)
        if output.stopped_here:
            stream.finish(event.index, "stop")
        if delta.finish_reason is not None:
            prompt_tokens = 0 if event.index % self.n else len(self.prompt_token_ids(event.index))
            self.observer.on_finish(
                self.model.name, delta.finish_reason, now - self._started, prompt_tokens, output.num_tokens
            )
        return delta

    def _observe_tokens(self, index: int, count: int, now: float) -> None:
        last = self._last_token[index]
        if last is not None:
            self.observer.on_tokens(self.model.name, now - last, count)
        elif not self._seen_token:
            self._seen_token = True
            self.observer.on_first_token(self.model.name, now - self._started)
        self._last_token[index] = now
