"""Log-probabilities in the two shapes that OpenAI gives them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ridgewalk.api.tokenizer import Tokenizer
from ridgewalk.engine.step import TokenLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's own choice."""


class TopLogprob(msgspec.Struct):
    """One token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    """One token that was."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """The ``logprobs`` of a chat choice: every token of the output, those of reasoning included."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """The ``logprobs`` of a plain completion; all lists run parallel."""

    text_offset: list[int]  # where the token begins in the choice's text
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]  # the sampled token is always among them


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """The chat shape for these tokens."""
    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=False):
        top = [TopLogprob(*_token(tokenizer, other, logprob)) for other, logprob in entry.top]
        content.append(ChatTokenLogprob(*_token(tokenizer, token_id, entry.logprob), top))
    return ChatLogprobs(content)


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]
) -> CompletionLogprobs:
    """The plain shape for these tokens, which begin at ``offsets`` of the choice's text."""
    tokens = [tokenizer.token_text(token_id) for token_id in token_ids]
    top_logprobs = []
    for token, entry in zip(tokens, logprobs, strict=False):
        top: dict[str, float] = {}
        for other, logprob in entry.top:  # best first: of two tokens that look the same, the better one stays
            top.setdefault(tokenizer.token_text(other), _finite(logprob))
        top.setdefault(token, _finite(entry.logprob))
        top_logprobs.append(top)
    return CompletionLogprobs(list(offsets), [_finite(entry.logprob) for entry in logprobs], tokens, top_logprobs)


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    raw = tokenizer.token_bytes(token_id)
    return raw.decode("utf-8", errors="replace"), _finite(logprob), list(raw)


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST  # not a number is not greater, either
