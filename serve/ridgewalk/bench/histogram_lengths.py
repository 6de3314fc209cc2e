"""Lengths in tokens as a service's histogram has them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

_STEEPEST = 16.0
"""Of the curve within buckets: beyond, all lengths of a bucket lie at one of its ends."""


@dataclass(frozen=True)
class HistogramLengths:
    """A distribution with the counts of a histogram's buckets and, as nearly as they allow, its mean.

    Within a bucket from a to b the length at share u is a (b / a)^(u^steepness), with one steepness for all.
    """

    bounds: tuple[float, ...]  # upper ones, rising, all finite
    counts: tuple[float, ...]  # of each bucket, not cumulative; not all 0
    steepness: float = 1.0

    @classmethod
    def of(cls, cumulative: Mapping[float, float], mean: float) -> HistogramLengths:
        """From cumulative counts by upper bound. What lies beyond the last finite one counts as being at it.

        Raises:
            ValueError: nothing was observed.
        """
        bounds = sorted(bound for bound in cumulative if bound < float("inf"))
        totals = [cumulative[bound] for bound in bounds]
        totals[-1] = max(cumulative.values())
        counts = tuple(later - earlier for earlier, later in zip([0.0, *totals], totals, strict=False))
        if sum(counts) <= 0:
            raise ValueError("nothing was observed")
        low, high = 1 / _STEEPEST, _STEEPEST
        for _ in range(30):  # the mean falls as the curve steepens
            middle = (low * high) ** 0.5
            low, high = (low, middle) if cls(tuple(bounds), counts, middle).mean < mean else (middle, high)
        return cls(tuple(bounds), counts, (low * high) ** 0.5)

    @property
    def mean(self) -> float:
        """Of forty lengths of each bucket."""
        totals = (
            count * sum(self._at(bucket, (at + 0.5) / 40) for at in range(40)) / 40
            for bucket, count in enumerate(self.counts)
            if count
        )
        return sum(totals) / sum(self.counts)

    def quantile(self, share: float) -> int:
        """The length that ``share`` of all, in (0, 1), do not exceed."""
        wanted = share * sum(self.counts)
        for bucket, total in enumerate(accumulate(self.counts)):
            if wanted <= total and self.counts[bucket] > 0:
                return self._at(bucket, 1 - (total - wanted) / self.counts[bucket])
        return round(self.bounds[-1])

    def sample(self, count: int, rng: random.Random) -> list[int]:
        """As `LogNormalLengths.sample`: the middles of equally likely strata, in random order."""
        lengths = [self.quantile((index + 0.5) / count) for index in range(count)]
        rng.shuffle(lengths)
        return lengths

    def _at(self, bucket: int, share: float) -> int:
        """A length over the bound before and not over the bucket's."""
        above = self.bounds[bucket]
        below = self.bounds[bucket - 1] if bucket else 0.0
        length = max(1.0, below) * (above / max(1.0, below)) ** (share**self.steepness)
        return max(int(below) + 1, round(length))
