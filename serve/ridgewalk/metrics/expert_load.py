"""How evenly the routed experts' work falls on the ranks that share them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ridgewalk.engine.step import RankTimings
    from ridgewalk.placement.mesh import Mesh

WINDOW_STEPS = 64
"""Measured steps that imbalance is taken over, a thousand steps: one step of a few tokens is always uneven."""

_Rows = list[list[int]]
"""Rows computed, by sparse layer of the model and expert-parallel rank."""


class Imbalance(NamedTuple):
    """Rows of the busiest rank / mean over the ranks of its stage: 1 is even, the number of ranks the worst."""

    worst: float  # of the sparse layers
    mean: float  # over the sparse layers


class ExpertLoad:
    """Rows that each rank computed for its experts in the last measured steps. Not thread-safe."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._steps: deque[_Rows] = deque()
        self._total: _Rows = []

    def on_timings(self, ranks: Sequence[RankTimings]) -> None:
        """Take in a measured step. One that some rank has not reported says nothing."""
        rows = self._rows(ranks)
        if not rows:
            return
        if not self._steps:
            self._total = [[0] * len(layer) for layer in rows]
        self._steps.append(rows)
        _add(self._total, rows, 1)
        if len(self._steps) > WINDOW_STEPS:
            _add(self._total, self._steps.popleft(), -1)

    def imbalance(self) -> Imbalance | None:
        """Over the last `WINDOW_STEPS` measured steps together; None when ranks share no experts or none worked."""
        layers = [max(layer) * len(layer) / total for layer in self._total if (total := sum(layer))]
        return Imbalance(max(layers), sum(layers) / len(layers)) if layers else None

    def _rows(self, ranks: Sequence[RankTimings]) -> _Rows:
        size = self._mesh.dp * self._mesh.tp
        if not self._mesh.expert_parallel or size == 1 or len(ranks) < self._mesh.world_size:
            return []
        ordered = sorted(ranks, key=lambda timings: timings.rank)
        stages = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        return [
            [sum(slots) for slots in layer]
            for stage in stages
            for layer in zip(*(timings.expert_tokens for timings in stage), strict=True)
        ]


def _add(total: _Rows, rows: _Rows, sign: int) -> None:
    for sums, layer in zip(total, rows, strict=True):
        for rank, count in enumerate(layer):
            sums[rank] += sign * count
