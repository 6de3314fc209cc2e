"""Distributions of lengths in tokens, and samples from them that show the distribution even when they are few."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist

_NORMAL = NormalDist()


@dataclass(frozen=True)
class LogNormalLengths:
    """Lengths whose logarithm is normal, cut (not drawn again) at ``shortest`` and ``longest`` as limits do."""

    median: float  # tokens; exp(mu)
    sigma: float
    shortest: int = 1
    longest: int = 2**31 - 1

    def quantile(self, share: float) -> float:
        """The length that ``share`` of all, in (0, 1), do not exceed."""
        length = self.median * math.exp(self.sigma * _NORMAL.inv_cdf(share))
        return min(max(length, self.shortest), self.longest)

    def share_above(self, length: float) -> float:
        """The share of lengths over ``length``."""
        if length >= self.longest:
            return 0.0
        if length < self.shortest:
            return 1.0
        return 1.0 - _NORMAL.cdf(math.log(length / self.median) / self.sigma)

    def sample(self, count: int, rng: random.Random) -> list[int]:
        """``count`` lengths in random order: the middles of ``count`` equally likely strata.

        So even a small sample has the quantiles of the distribution, whatever the seed, and no outlier decides a run.
        """
        lengths = [max(1, round(self.quantile((index + 0.5) / count))) for index in range(count)]
        rng.shuffle(lengths)
        return lengths


def lognormal_with_share_above(length: float, share: float, *, sigma: float, longest: int) -> LogNormalLengths:
    """The distribution of this ``sigma`` in which ``share`` of the lengths exceed ``length``."""
    return LogNormalLengths(length * math.exp(-sigma * _NORMAL.inv_cdf(1.0 - share)), sigma, longest=longest)


def lognormal_with_share_within(low: float, high: float, share: float, *, longest: int) -> LogNormalLengths:
    """The distribution with ``share`` of the lengths between ``low`` and ``high``, and as many below as above."""
    sigma = math.log(high / low) / 2.0 / _NORMAL.inv_cdf(0.5 + share / 2.0)
    return LogNormalLengths(math.sqrt(low * high), sigma, longest=longest)
