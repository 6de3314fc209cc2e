"""How long the steps of a placement take, as a sum of terms that are learned from what its replicas report.

While a step's time is that of reading weights, more sequences hardly cost anything; from some number on their products
take longer than the reading (the roofline), and each costs its full share. So the time is convex in their number, and
is learned as such: the slope may grow at each of `BENDS`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.least_squares import non_negative_solution

HALF_LIFE = 8000
"""Steps after which one counts half: contexts grow, and neighbours on the machine come and go."""

RIDGE = 2e-4
"""Of the weight of each term but the base. What never varied is taken for base: a replica that was never busy is
thought to bear more without getting slower, until it has shown that it does not."""

BEND_RIDGE = 2e-4
"""Of all steps: as if so many had been twice as busy as a bend and no slower for it. A step or two just beyond a bend
say nothing of the slope there, however slow they were."""

MIN_STEPS = 8
"""Fewer say nothing yet."""

BENDS = (4, 16, 64, 256)
"""Numbers of sequences from which one more may cost more than before."""

_NUM_TERMS = 4 + len(BENDS)


@dataclass(frozen=True)
class StepPace:
    """Seconds from one token of a sequence to its next: a sum over what its replica has to do for all of them.

    ``base_s`` is what a step takes however little is in it: reading weights, and waiting for the other ranks.
    """

    base_s: float
    sequence_s: float  # for each running sequence
    block_s: float  # for each KV block attended to
    prefill_token_s: float  # for each prompt token computed
    bends_s: tuple[float, ...] = ()  # for each sequence beyond the number in `BENDS`, in addition

    def step_s(self, num_sequences: float, num_blocks: float) -> float:
        """Seconds of a step without prompts."""
        beyond = sum(
            bend_s * (num_sequences - bend)
            for bend, bend_s in zip(BENDS, self.bends_s, strict=False)
            if bend < num_sequences
        )
        return self.base_s + self.sequence_s * num_sequences + beyond + self.block_s * num_blocks

    def more_s(self, num_sequences: float, more: float) -> float:
        """Seconds by which each of so ``more`` sequences makes a step longer, what they attend to left aside."""
        return (self.step_s(num_sequences + more, 0) - self.step_s(num_sequences, 0)) / more


class PaceEstimate:
    """Least squares of the relative error, no term below zero, older steps counting ever less.

    Relative: a step that the machine held up for a second says no more than any other.
    """

    def __init__(self) -> None:
        self._products = np.zeros((_NUM_TERMS, _NUM_TERMS))
        self._targets = np.zeros(_NUM_TERMS)
        self._num_steps = 0
        self._decay = 0.5 ** (1 / HALF_LIFE)

    def observe(self, means: StepMeans) -> None:
        """Some steps of one replica."""
        if means.seconds <= 0:
            return
        beyond = [max(0.0, means.sequences - bend) for bend in BENDS]
        features = np.array([1.0, means.sequences, means.blocks, means.prefill_tokens, *beyond]) / means.seconds
        faded = self._decay**means.steps
        self._products = self._products * faded + means.steps * np.outer(features, features)
        self._targets = self._targets * faded + means.steps * features
        self._num_steps += means.steps

    def pace(self) -> StepPace | None:
        """The terms; None before `MIN_STEPS` steps."""
        if self._num_steps < MIN_STEPS:
            return None
        products = self._products.copy()
        bends = range(_NUM_TERMS - len(BENDS), _NUM_TERMS)
        products[bends, bends] += BEND_RIDGE * products[0, 0] * np.square(BENDS)
        scale = np.sqrt(np.maximum(np.diag(products), 1e-300))
        products /= np.outer(scale, scale)
        products[range(_NUM_TERMS), range(_NUM_TERMS)] += RIDGE * np.array([1e-3, 1.0, 1.0, 1.0] + [0.0] * len(BENDS))
        base, sequence, block, prefill, *slopes = non_negative_solution(products, self._targets / scale) / scale
        return StepPace(float(base), float(sequence), float(block), float(prefill), tuple(map(float, slopes)))
