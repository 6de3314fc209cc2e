"""How long a sequence with a thinking budget has thought, read off its own tokens."""

from __future__ import annotations

import numpy as np

from ridgewalk.engine.sampling import ReasoningBudget

OPENS_WITHIN = 4
"""Thinking begins with one of the first so many output tokens (whitespace may come before), or not at all: a tag that
an answer mentions is text."""


class Thinking:
    """One sequence's thinking, brought up to date as tokens arrive. A function of the output alone.

    So a sequence that is preempted, moved or resumed has its thinking ended at the very same token.
    """

    def __init__(self, budget: ReasoningBudget) -> None:
        self._budget = budget
        self._is_open = budget.begins_open
        self._is_over = False
        self._num_tokens = 0  # of thinking
        self._counted = 0  # tokens of the output

    def update(self, output_token_ids: np.ndarray) -> None:
        """Read what was appended since the last call. ``output_token_ids`` is the whole output."""
        if not self._is_over:
            for token_id in output_token_ids[self._counted :].tolist():
                self._read(token_id)
        self._counted = len(output_token_ids)

    @property
    def must_end(self) -> bool:
        """True when the next token has to be the closing tag."""
        return self._is_open and self._num_tokens >= self._budget.max_tokens

    def _read(self, token_id: int) -> None:
        if self._is_open and token_id == self._budget.close_token_id:
            self._is_open, self._is_over = False, True
        elif token_id == self._budget.open_token_id:
            self._is_open = self._is_open or (not self._is_over and self._counted < OPENS_WITHIN)
        elif self._is_open:
            self._num_tokens += 1
        self._counted += 1
