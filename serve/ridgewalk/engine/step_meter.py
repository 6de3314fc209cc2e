"""What a replica's steps had to do, and how long they took: what a router learns the replica's pace from."""

from __future__ import annotations

import msgspec

from ridgewalk.engine.step import StepInput


class StepMeans(msgspec.Struct, frozen=True, array_like=True):
    """Means over some steps that followed each other.

    In a pipeline a step is taken for the whole round that gives each sequence one token.
    """

    steps: int
    seconds: float
    sequences: float
    blocks: float  # of KV, attended to
    prefill_tokens: float


class StepMeter:
    """Adds up steps until they are taken."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._clear()

    def observe(self, step: StepInput, seconds: float, rounds: int = 1) -> None:
        """One step. ``rounds``: steps, this one among them, that all sequences need to have one token each."""
        sequences, tokens, prefill_tokens = 0, 0, 0
        for batch in step.groups:
            sequences += len(batch.seq_ids)
            tokens += sum(batch.num_computed_tokens)
            scheduled = batch.num_scheduled_tokens
            prefill_tokens += sum(scheduled) - scheduled.count(1)
        self.add(
            StepMeans(
                1, seconds * rounds, sequences * rounds, tokens / self._block_size * rounds, prefill_tokens * rounds
            )
        )

    def add(self, means: StepMeans) -> None:
        """Steps that were averaged already."""
        self._steps += means.steps
        self._seconds += means.steps * means.seconds
        self._sequences += means.steps * means.sequences
        self._blocks += means.steps * means.blocks
        self._prefill_tokens += means.steps * means.prefill_tokens

    def take(self) -> StepMeans | None:
        """The means since the last call; None without a step."""
        count = self._steps
        if count == 0:
            return None
        means = StepMeans(
            count, self._seconds / count, self._sequences / count, self._blocks / count, self._prefill_tokens / count
        )
        self._clear()
        return means

    def _clear(self) -> None:
        self._steps = 0
        self._seconds = self._sequences = self._blocks = self._prefill_tokens = 0.0
