"""What a routing policy answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

RoutingName = Literal["kv_growth", "least_loaded", "round_robin"]


class RoutingReason(str, Enum):
    """Why a replica was chosen."""

    ONLY = "only_replica"
    LEAST_LOADED = "least_loaded"  # the fewest sequences per seat (kv_growth, cold: per seat that KV has room for)
    ALL_FULL = "all_full"  # every replica has more to do than it has room for: the one that delays least
    NEXT = "round_robin"
    LEAST_DELAY = "least_delay"  # of replicas of one shape
    POOLED_KV = "pooled_kv"  # rather than one of smaller attention groups
    FEWER_RANKS = "fewer_ranks"  # rather than one whose ranks wait for more others in every step
    CACHED_PREFIX = "cached_prefix"  # its prompt's beginning is cached there; another one would delay less otherwise
    LATENCY_SLO = "latency_slo"  # more requests keep the pace that they ask for than where the delay would be least
    KV_CLIFF = "kv_cliff"  # the one that would be better has, or will soon have, no KV for it


@dataclass(frozen=True)
class RoutingDecision:
    """A choice and its reason."""

    replica_id: str
    reason: RoutingReason
