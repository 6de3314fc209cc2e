"""The ``usage`` object: tokens that a request read and wrote."""

from __future__ import annotations

import msgspec


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt's tokens."""

    cached_tokens: int  # found in the prefix cache


class CompletionTokensDetails(msgspec.Struct):
    """Of the output's tokens."""

    reasoning_tokens: int  # between the tags of reasoning, tags excluded


class Usage(msgspec.Struct):
    """OpenAI's ``CompletionUsage``. Each prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Usage:
        """The object for these counts."""
        details = PromptTokensDetails(cached), CompletionTokensDetails(reasoning)
        return cls(prompt, completion, prompt + completion, *details)
