"""The default policy: the replica with the fewest sequences per seat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class ReplicaLoad:
    """What a router knows of one replica."""

    replica_id: str
    num_running: int
    num_waiting: int
    num_own: int  # sequences that this ingress has open there: some of them may not be reported yet
    num_seats: int  # sequences that may run at once
    available_blocks: int  # free and evictable, over all attention groups
    total_blocks: int


class RoutingReason(str, Enum):
    """Why a replica was chosen."""

    ONLY = "only_replica"
    LEAST_LOADED = "least_loaded"
    ALL_FULL = "all_full"  # every replica has work waiting: the shortest queue


@dataclass(frozen=True)
class RoutingDecision:
    """A choice and its reason."""

    replica_id: str
    reason: RoutingReason


def choose_replica(loads: Iterable[ReplicaLoad]) -> RoutingDecision | None:
    """The replica for a new request; None when there is none.

    A replica with waiting sequences is chosen only when all have some. Otherwise sequences per seat decide, so that
    replicas of unequal size fill evenly; ties go to the largest share of available KV.
    """
    candidates = list(loads)
    if not candidates:
        return None
    best = min(candidates, key=_key)
    if len(candidates) == 1:
        return RoutingDecision(best.replica_id, RoutingReason.ONLY)
    full = best.num_waiting > 0
    return RoutingDecision(best.replica_id, RoutingReason.ALL_FULL if full else RoutingReason.LEAST_LOADED)


def _key(load: ReplicaLoad) -> tuple[bool, float, float]:
    # A report is at most 100 ms old; what this ingress sent since is in `num_own` and not in the report.
    sequences = max(load.num_running + load.num_waiting, load.num_own)
    return load.num_waiting > 0, sequences / max(load.num_seats, 1), -load.available_blocks / max(load.total_blocks, 1)
