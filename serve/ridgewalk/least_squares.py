"""Least squares of which no term may be negative."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

TOLERANCE = 1e-12
"""Of the greatest target: by so much a term would have to help to be taken in."""


def non_negative_solution(products: Array, targets: Array) -> Array:
    """The x without negative elements of which ``x' P x - 2 t' x`` is least, by an active set (Lawson and Hanson 1974).

    Args:
        products: ``P = A' A``, ``[n, n]``; a term that never occurs has zeros there.
        targets: ``t = A' b``, ``[n]``.
    """
    found = np.zeros(len(targets))
    kept: list[int] = []
    least = TOLERANCE * float(np.abs(targets).max(initial=0.0))
    for _ in range(3 * len(targets)):  # each turn lowers the sum; rounding must not keep it from ending
        gain = targets - products @ found
        gain[kept] = -np.inf
        best = int(gain.argmax())
        if gain[best] <= least:
            break
        kept.append(best)
        while kept:
            solved = np.linalg.lstsq(products[np.ix_(kept, kept)], targets[kept], rcond=None)[0]
            if solved.min() > 0:
                found[:] = 0.0
                found[kept] = solved
                break
            # As far towards the solution as no term goes below zero; those that are there leave.
            now = found[kept]
            falling = solved <= 0
            share = float((now[falling] / (now[falling] - solved[falling])).min())
            now = now + share * (solved - now)
            found[kept] = now
            kept = [term for term, value, falls in zip(kept, now, falling, strict=True) if not falls or value > 1e-300]
            if len(kept) == len(now):
                kept.remove(kept[int(np.where(falling, now, np.inf).argmin())])
            found[[term for term in range(len(found)) if term not in kept]] = 0.0
    return found
