"""Wait and transfer: what a collective cost by itself, and what the late ranks added to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ridgewalk.engine.step import RankTimings

CollectiveKey = tuple[str, str, str]
"""``(op, phase, rank)``, phase being wait or transfer."""


def split_collectives(ranks: Sequence[RankTimings], tp: int) -> dict[CollectiveKey, list[float]]:
    """Seconds of every collective of one measured step.

    For one collective, i.e. one position in the lists of the ranks of a tensor-parallel group, ``transfer`` is the
    shortest duration and a rank's ``wait`` its own duration less that: the last rank to enter waits for nobody.
    A group whose lists are not of the same calls, or that is not complete, says nothing and is left out.
    """
    groups: defaultdict[int, list[RankTimings]] = defaultdict(list)
    for timings in ranks:
        groups[timings.rank // tp].append(timings)  # ranks are numbered tp fastest
    seconds: defaultdict[CollectiveKey, list[float]] = defaultdict(list)
    for group in groups.values():
        if len(group) == tp and _same_calls(group):
            _split_group(group, seconds)
    return seconds


def _same_calls(group: list[RankTimings]) -> bool:
    ops = [timing.op for timing in group[0].collectives]
    return all([timing.op for timing in other.collectives] == ops for other in group[1:])


def _split_group(group: list[RankTimings], seconds: defaultdict[CollectiveKey, list[float]]) -> None:
    shortest = [min(c.seconds for c in calls) for calls in zip(*(r.collectives for r in group), strict=True)]
    for timings in group:
        rank = str(timings.rank)
        for timing, transfer in zip(timings.collectives, shortest, strict=True):
            seconds[timing.op, "transfer", rank].append(transfer)
            seconds[timing.op, "wait", rank].append(timing.seconds - transfer)
