"""How long the steps of a placement take, as a sum of four terms that are learned from what its replicas report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ridgewalk.engine.step_meter import StepMeans

HALF_LIFE = 8000
"""Steps after which one counts half: contexts grow, and neighbours on the machine come and go."""

RIDGE = 1e-3
"""Of the weight of each term but the base. What never varied is taken for base: a replica that was never busy is
thought to bear more without getting slower, until it has shown that it does not."""

MIN_STEPS = 8
"""Fewer say nothing yet."""


@dataclass(frozen=True)
class StepPace:
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
        self._num_steps = 0
        self._decay = 0.5 ** (1 / HALF_LIFE)

    def observe(self, means: StepMeans) -> None:
        """Some steps of one replica."""
        if means.seconds <= 0:
            return
        features = np.array([1.0, means.sequences, means.blocks, means.prefill_tokens]) / means.seconds
        faded = self._decay**means.steps
        self._products = self._products * faded + means.steps * np.outer(features, features)
        self._targets = self._targets * faded + means.steps * features
        self._num_steps += means.steps

    def pace(self) -> StepPace | None:
        """The terms; None before `MIN_STEPS` steps."""
        if self._num_steps < MIN_STEPS:
            return None
        scale = np.sqrt(np.maximum(np.diag(self._products), 1e-300))
        products = self._products / np.outer(scale, scale) + RIDGE * np.diag([1e-3, 1.0, 1.0, 1.0])
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
