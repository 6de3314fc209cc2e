"""How long a replica's steps take, as a sum of four terms that are learned from its own steps."""

from __future__ import annotations

import msgspec
import numpy as np

from ridgewalk.engine.step import StepInput

HALF_LIFE = 2000
"""Steps after which one counts half: contexts grow, and neighbours on the machine come and go."""

RIDGE = 1e-3
"""Of each term's own weight. Terms that never varied apart from each other share what they explain evenly."""

MIN_STEPS = 8
"""Fewer say nothing yet."""


class StepPace(msgspec.Struct, frozen=True, array_like=True):
    """Seconds from one token of a sequence to its next: a sum over what its replica has to do for all of them.

    ``base_s`` is what a step takes however little is in it: reading weights, and waiting for the other ranks.
    """

    base_s: float
    sequence_s: float  # for each running sequence
    block_s: float  # for each KV block attended to
    prefill_token_s: float  # for each prompt token computed

    def step_s(self, num_sequences: float, num_blocks: float) -> float:
        """Seconds of a step without prompts."""
        return self.base_s + self.sequence_s * num_sequences + self.block_s * num_blocks


class PaceEstimate:
    """Least squares of the relative error, no term below zero, older steps counting ever less.

    Relative: a step that the machine held up for a second says no more than any other.
    """

    def __init__(self) -> None:
        self._products = np.zeros((4, 4))
        self._targets = np.zeros(4)
        self._num_steps = 0.0
        self._decay = 0.5 ** (1 / HALF_LIFE)

    def observe(
        self, seconds: float, num_sequences: float, num_blocks: float, prefill_tokens: float, steps: int = 1
    ) -> None:
        """``steps`` steps alike that took ``seconds`` each."""
        if seconds <= 0:
            return
        features = np.array([1.0, num_sequences, num_blocks, prefill_tokens]) / seconds
        faded = self._decay**steps
        weight = (1 - faded) / (1 - self._decay)
        self._products = self._products * faded + weight * np.outer(features, features)
        self._targets = self._targets * faded + weight * features
        self._num_steps += steps

    def observe_step(self, step: StepInput, seconds: float, block_size: int, rounds: int = 1) -> None:
        """One step. ``rounds``: steps, this one among them, that all sequences need to have one token each."""
        sequences, tokens, prefill_tokens = 0, 0, 0
        for batch in step.groups:
            sequences += len(batch.seq_ids)
            tokens += sum(batch.num_computed_tokens)
            scheduled = batch.num_scheduled_tokens
            prefill_tokens += sum(scheduled) - scheduled.count(1)
        self.observe(seconds * rounds, sequences * rounds, tokens / block_size * rounds, prefill_tokens * rounds)

    def pace(self) -> StepPace | None:
        """The terms; None before `MIN_STEPS` steps."""
        if self._num_steps < MIN_STEPS:
            return None
        scale = np.sqrt(np.maximum(np.diag(self._products), 1e-300))
        products = self._products / np.outer(scale, scale) + RIDGE * np.eye(4)
        targets = self._targets / scale
        terms = [term for term in range(4) if self._products[term, term] > 0]
        found = np.zeros(4)
        while terms:
            some = np.linalg.solve(products[np.ix_(terms, terms)], targets[terms])
            if some.min() >= 0:
                found[terms] = some / scale[terms]
                break
            terms.remove(terms[int(some.argmin())])
        return StepPace(*(float(term) for term in found))
