"""What ``/v1/chat/completions`` answers: OpenAI's objects, with vLLM's additions where the client asks for them."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from ridgewalk.api.generation import Generation
from ridgewalk.api.logprobs import ChatLogprobs, chat_logprobs
from ridgewalk.api.output import OutputDelta
from ridgewalk.api.sse import frame
from ridgewalk.api.usage import Usage


class ReplyMessage(msgspec.Struct):
    """The assistant's message. Reasoning goes by two names, because clients look for either."""

    role: str
    content: str | None
    refusal: str | None
    reasoning_content: str | None
    reasoning: str | None


class ChatChoice(msgspec.Struct):
    """One complete choice."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """The whole answer."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


class MessageDelta(msgspec.Struct):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """What a chunk adds to a choice."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    """One event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatWriter:
    """Writes one request's answer, streamed or whole."""

    def __init__(
        self,
        generation: Generation,
        created: int,
        *,
        logprobs: bool = False,
        token_ids: bool = False,
        usage: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        """``token_ids``, ``usage``, ``continuous_usage``: what the client wants to see besides."""
        self._generation = generation
        self._created = created
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._usage = usage
        self._continuous_usage = continuous_usage
        self._encode = msgspec.json.Encoder().encode

    def opening(self) -> bytes:
        """The first events of a stream: the role of each choice's message."""
        frames = []
        for index in range(self._generation.num_choices):
            chunk = self._chunk([ChunkChoice(index, MessageDelta(role="assistant", content=""))])
            if index == 0 and self._token_ids:
                chunk.prompt_token_ids = self._generation.prompt_token_ids(0)
            frames.append(frame(self._encode(chunk)))
        return b"".join(frames)

    def event(self, delta: OutputDelta) -> bytes:
        """The events for a delta; none when all its text is held back."""
        choices = []
        if delta.reasoning:
            message = MessageDelta(reasoning_content=delta.reasoning, reasoning=delta.reasoning)
            choices.append(ChunkChoice(delta.index, message))
        if delta.content:
            choices.append(ChunkChoice(delta.index, MessageDelta(content=delta.content)))
        tokens = self._token_ids and delta.token_ids
        logprobs = self._logprobs and delta.logprobs
        if not choices and (delta.finish_reason is not None or tokens or logprobs):
            choices.append(ChunkChoice(delta.index, MessageDelta()))
        if tokens:
            choices[0].token_ids = delta.token_ids
        if logprobs:
            choices[0].logprobs = chat_logprobs(self._generation.model.tokenizer, delta.token_ids, delta.logprobs)
        if delta.finish_reason is not None:
            choices[-1].finish_reason = delta.finish_reason
            choices[-1].stop_reason = delta.stop_reason
        return b"".join(frame(self._encode(self._chunk([choice]))) for choice in choices)

    def closing(self) -> bytes:
        """The last events of a stream, before its end."""
        if not self._usage:
            return b""
        chunk = self._chunk([])
        chunk.usage = self._generation.usage()
        return frame(self._encode(chunk))

    def whole(self, deltas: list[list[OutputDelta]]) -> bytes:
        """The answer in one piece; ``deltas`` by choice."""
        reply = ChatCompletion(
            id=self._generation.request_id,
            object="chat.completion",
            created=self._created,
            model=self._generation.model.name,
            choices=[self._choice(index, parts) for index, parts in enumerate(deltas)],
            usage=self._generation.usage(),
        )
        if self._token_ids:
            reply.prompt_token_ids = self._generation.prompt_token_ids(0)
        return self._encode(reply)

    def _choice(self, index: int, parts: list[OutputDelta]) -> ChatChoice:
        reasoning = "".join(part.reasoning for part in parts) or None
        content = "".join(part.content for part in parts)
        token_ids = [token_id for part in parts for token_id in part.token_ids]
        logprobs = None
        if self._logprobs:
            entries = [entry for part in parts for entry in part.logprobs]
            logprobs = chat_logprobs(self._generation.model.tokenizer, token_ids, entries)
        return ChatChoice(
            index=index,
            message=ReplyMessage("assistant", content or (None if reasoning else ""), None, reasoning, reasoning),
            logprobs=logprobs,
            finish_reason=parts[-1].finish_reason or "stop",
            stop_reason=parts[-1].stop_reason,
            token_ids=token_ids if self._token_ids else UNSET,
        )

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        usage: Usage | UnsetType | None = None if self._usage else UNSET
        if self._continuous_usage:
            usage = self._generation.usage()
        generation = self._generation
        return ChatChunk(
            generation.request_id, "chat.completion.chunk", self._created, generation.model.name, choices, usage
        )
