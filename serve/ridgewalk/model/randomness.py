"""Counter-based randomness: one uniform number for each (seed, position), whatever else is in the batch."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Float64 in [0, 1) for arrays of seeds and of positions, by two rounds of SplitMix64.

    The finalizer is that of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014): a
    bijection of 64 bits, so that neighbouring seeds and positions give unrelated numbers.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        mixed = _finalize(seeds.astype(np.uint64) + _GOLDEN)
        mixed = _finalize(mixed + positions.astype(np.uint64) * _GOLDEN + _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalize(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
