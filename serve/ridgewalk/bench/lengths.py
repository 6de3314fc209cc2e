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
        """``count`` lengths in random order, one from each of ``count`` equally likely strata.

        So the sample's quantiles are those of the distribution within one stratum, whatever the seed.
        """
        shares = [(index + _inside(rng)) / count for index in range(count)]
        rng.shuffle(shares)
        return [max(1, round(self.quantile(share))) for share in shares]


def lognormal_with_share_above(length: float, share: float, *, sigma: float, longest: int) -> LogNormalLengths:
    """The distribution of this ``sigma`` in which ``share`` of the lengths exceed ``length``."""
    return LogNormalLengths(length * math.exp(-sigma * _NORMAL.inv_cdf(1.0 - share)), sigma, longest=longest)


def lognormal_with_share_within(low: float, high: float, share: float, *, longest: int) -> LogNormalLengths:
    """The distribution with ``share`` of the lengths between ``low`` and ``high``, and as many below as above."""
    sigma = math.log(high / low) / 2.0 / _NORMAL.inv_cdf(0.5 + share / 2.0)
    return LogNormalLengths(math.sqrt(low * high), sigma, longest=longest)


def _inside(rng: random.Random) -> float:
    return min(max(rng.random(), 1e-6), 1.0 - 1e-6)  # a quantile of 0 or 1 is infinite
