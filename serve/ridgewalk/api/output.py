"""One sequence's tokens on their way to text: detokenized, cut at stop strings, parted into reasoning and content."""

from __future__ import annotations

from dataclasses import dataclass, field

from ridgewalk.api.backend import Sequence, ServedModel, TokenEvent
from ridgewalk.api.detokenizer import IncrementalDetokenizer
from ridgewalk.api.reasoning import ReasoningCounter, ReasoningSplitter
from ridgewalk.api.stop_strings import StopAutomaton, StopStringFilter
from ridgewalk.engine.step import TokenLogprobs


@dataclass(frozen=True)
class OutputOptions:
    """What a request asks of the text of its sequences."""

    skip_special_tokens: bool = True
    stop: StopAutomaton | None = None
    include_stop: bool = False  # the stop string or stop token stays in the text
    reasoning_tags: tuple[str, str] | None = None  # None: no parting, all is content
    continues_prompt: bool = False  # the text goes on where the prompt's ended; else it is a text of its own


@dataclass(slots=True)
class OutputDelta:
    """What one event adds to one sequence. Text may lag behind tokens: some is held back."""

    index: int
    content: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)  # where each token begins in the sequence's text
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop string, or the stop token unless that is the model's own EOS


class SequenceOutput:
    """State of one sequence's text. Tokens after a stop string are ignored and count nowhere."""

    def __init__(
        self, index: int, model: ServedModel, sequence: Sequence, options: OutputOptions, prompt: str = ""
    ) -> None:
        """``prompt``: the rendered chat, from which the splitter sees whether reasoning has already begun."""
        self.index = index
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._eos_ids = model.eos_token_ids
        self._min_tokens = sequence.sampling.min_tokens
        self._stop_ids = frozenset(sequence.sampling.stop_token_ids)
        self._silent_ids = frozenset() if options.include_stop else self._stop_ids
        self._chars = 0  # of text, before stop strings cut it
        self._stops = StopStringFilter(options.stop, options.include_stop) if options.stop else None
        self._splitter: ReasoningSplitter | None = None
        self._counter: ReasoningCounter | None = None
        tag_ids: frozenset[int] = frozenset()
        if options.reasoning_tags is not None:
            ids = (model.tokenizer.token_id(tag) for tag in options.reasoning_tags)
            tag_ids = frozenset(i for i in ids if i is not None)
            self._splitter = ReasoningSplitter(prompt, options.reasoning_tags)
            self._counter = ReasoningCounter(self._splitter, tag_ids)
        # A tokenizer may mark the tags as special: their text is needed all the same.
        context = sequence.prompt_token_ids if options.continues_prompt else ()
        self._detokenizer = IncrementalDetokenizer(model.tokenizer, options.skip_special_tokens, tag_ids, context)

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens known to be reasoning; exact once the sequence has ended."""
        return self._counter.count if self._counter else 0

    @property
    def stopped_here(self) -> bool:
        """True once a stop string was seen: the backend does not know of it."""
        return self._stops is not None and self._stops.matched is not None

    def push(self, event: TokenEvent) -> OutputDelta | None:
        """Take an event in; None when the sequence had already ended."""
        if self.finish_reason is not None:
            return None
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        delta = OutputDelta(self.index)
        text = self._push_tokens(event, delta)
        if self.stopped_here:
            delta.finish_reason, delta.stop_reason = "stop", self._stops.matched if self._stops else None
        elif event.finish_reason is not None:
            text += self._end_of_text()
            delta.finish_reason, delta.stop_reason = event.finish_reason, self._stop_token(event)
            if self.stopped_here:
                delta.finish_reason, delta.stop_reason = "stop", self._stops.matched if self._stops else None
        self._split(text, delta)
        self.finish_reason = delta.finish_reason
        return delta

    def _push_tokens(self, event: TokenEvent, delta: OutputDelta) -> str:
        text = ""
        for token_id in event.token_ids:
            self.num_tokens += 1
            delta.token_ids.append(token_id)
            delta.text_offsets.append(self._chars)
            if self._counter is not None:
                self._counter.add(token_id, self._chars)
            # Such a token always ends its sequence, but the event that says so may come after the one that brings it.
            piece = "" if token_id in self._silent_ids else self._detokenizer.push(token_id)
            self._chars += len(piece)
            if self._stops is not None:
                piece = self._stops.push(piece, may_stop=self.num_tokens >= self._min_tokens)
            text += piece
            if self.stopped_here:
                break
        if event.logprobs is not None:
            delta.logprobs = event.logprobs[: len(delta.token_ids)]
        return text

    def _end_of_text(self) -> str:
        text = self._detokenizer.flush()
        self._chars += len(text)
        if self._stops is not None:
            text = self._stops.push(text) + self._stops.flush()
        return text

    def _split(self, text: str, delta: OutputDelta) -> None:
        if self._splitter is None or self._counter is None:
            delta.content = text
            return
        delta.reasoning, delta.content = self._splitter.push(text)
        if delta.finish_reason is not None:
            last = self._splitter.flush()
            delta.reasoning += last.reasoning
            delta.content += last.content
        self._counter.settle(final=delta.finish_reason is not None)

    def _stop_token(self, event: TokenEvent) -> int | None:
        return None if event.stop_token_id in self._eos_ids else event.stop_token_id
