"""What ``/v1/completions`` answers: OpenAI's objects, with vLLM's additions where the client asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from ridgewalk.api.generation import Generation
from ridgewalk.api.logprobs import CompletionLogprobs, completion_logprobs
from ridgewalk.api.output import OutputDelta
from ridgewalk.api.sse import frame
from ridgewalk.api.usage import Usage


class CompletionChoice(msgspec.Struct):
    """One choice, or what an event of a stream adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """The whole answer, or one event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionWriter:
    """Writes one request's answer, streamed or whole."""

    def __init__(
        self,
        generation: Generation,
        created: int,
        *,
        echo: Sequence[str] | None = None,
        logprobs: bool = False,
        token_ids: bool = False,
        usage: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        """``echo``: the text of each prompt, to be put before its choices' text."""
        self._generation = generation
        self._created = created
        self._echo = echo
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._usage = usage
        self._continuous_usage = continuous_usage
        self._begun = [False] * generation.num_choices
        self._encode = msgspec.json.Encoder().encode

    def opening(self) -> bytes:
        """The first events of a stream: none, a plain completion begins with its text."""
        return b""

    def event(self, delta: OutputDelta) -> bytes:
        """The event for a delta; none when all its text is held back."""
        is_first = not self._begun[delta.index]
        choice = self._choice(delta.index, [delta], whole=False, is_first=is_first)
        if not (choice.text or delta.finish_reason or choice.logprobs or (self._token_ids and delta.token_ids)):
            return b""
        self._begun[delta.index] = True
        return frame(self._encode(self._reply([choice], self._chunk_usage())))

    def closing(self) -> bytes:
        """The last events of a stream, before its end."""
        if not self._usage:
            return b""
        return frame(self._encode(self._reply([], self._generation.usage())))

    def whole(self, deltas: list[list[OutputDelta]]) -> bytes:
        """The answer in one piece; ``deltas`` by choice."""
        choices = [self._choice(index, parts, whole=True, is_first=True) for index, parts in enumerate(deltas)]
        return self._encode(self._reply(choices, self._generation.usage()))

    def _choice(self, index: int, parts: list[OutputDelta], *, whole: bool, is_first: bool) -> CompletionChoice:
        generation = self._generation
        token_ids = [token_id for part in parts for token_id in part.token_ids]
        text = "".join(part.content for part in parts)
        if is_first and self._echo is not None:
            text = self._echo[index // generation.n] + text
        choice = CompletionChoice(index, text, finish_reason=parts[-1].finish_reason, stop_reason=parts[-1].stop_reason)
        entries = [entry for part in parts for entry in part.logprobs]
        if self._logprobs and (entries or whole):
            offsets = [offset for part in parts for offset in part.text_offsets]
            choice.logprobs = completion_logprobs(generation.model.tokenizer, token_ids, entries, offsets)
        if self._token_ids:
            choice.token_ids = token_ids
            if is_first:
                choice.prompt_token_ids = generation.prompt_token_ids(index)
        return choice

    def _chunk_usage(self) -> Usage | UnsetType | None:
        if self._continuous_usage:
            return self._generation.usage()
        return None if self._usage else UNSET

    def _reply(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        generation = self._generation
        return Completion(
            generation.request_id, "text_completion", self._created, generation.model.name, choices, usage
        )
