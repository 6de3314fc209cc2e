"""The default policy: the replica with the least work per seat, among those with room in their KV cache."""

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
    num_sent: int  # sequences sent since the replica's last report: it does not count them yet
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

    A replica with waiting sequences is chosen only when all have some; ties go to the most available KV, so that
    replicas of unequal size fill evenly.
    """
    candidates = list(loads)
    if not candidates:
        return None
    best = min(candidates, key=_key)
    if len(candidates) == 1:
        return RoutingDecision(best.replica_id, RoutingReason.ONLY)
    full = best.num_waiting > 0
    return RoutingDecision(best.replica_id, RoutingReason.ALL_FULL if full else RoutingReason.LEAST_LOADED)


def _key(load: ReplicaLoad) -> tuple[int, int, float]:
    queue = load.num_waiting + load.num_sent if load.num_waiting else 0
    busy = load.num_running + load.num_sent
    return queue, busy, -load.available_blocks / max(load.total_blocks, 1)
