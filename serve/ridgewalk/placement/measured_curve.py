"""A quantity that was measured at a few sizes, at any size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MeasuredCurve:
    """Seconds, or anything that adds up as they do, by size. Linear between the sizes measured.

    Below the least size it is what it is there (a kernel takes no less for half a row), beyond the greatest it grows
    in proportion.
    """

    sizes: tuple[float, ...]  # rising
    values: tuple[float, ...]

    @classmethod
    def of(cls, measured: Mapping[int, float]) -> MeasuredCurve:
        """From values by size, at least one."""
        sizes = sorted(measured)
        return cls(tuple(sizes), tuple(measured[size] for size in sizes))

    def at(self, size: float) -> float:
        """The value at any size."""
        after = bisect_left(self.sizes, size)
        if after == 0:
            return self.values[0]
        if after == len(self.sizes):
            return self.values[-1] * size / self.sizes[-1]
        low, high = self.sizes[after - 1], self.sizes[after]
        share = (size - low) / (high - low)
        return self.values[after - 1] * (1 - share) + self.values[after] * share
