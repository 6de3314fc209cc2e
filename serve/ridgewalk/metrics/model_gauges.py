"""Gauges of a whole model, which no replica can know alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from prometheus_client.core import Metric

from ridgewalk.metrics import catalogue
from ridgewalk.metrics.families import Labels, gauges
from ridgewalk.metrics.snapshot import GroupState, ReplicaState

STARVED_WITHIN_S = 5.0
"""A group that throttled or preempted for want of KV so recently makes what others have free stranded."""


def model_gauges(replicas: Iterable[ReplicaState]) -> list[Metric]:
    """The gauges of every model that has replicas here; those that are not known for any model are empty."""
    models: defaultdict[str, list[ReplicaState]] = defaultdict(list)
    for replica in replicas:
        models[replica.model_name].append(replica)
    return [
        gauges(spec, _known((name, function(models[name])) for name in sorted(models)))
        for spec, function in (
            (catalogue.KV_STRANDED, stranded_ratio),
            (catalogue.KV_WEIGHT_REPLICATION, weight_replication_bytes),
            (catalogue.CAPACITY_TRAP, capacity_trap),
        )
    ]


def stranded_ratio(replicas: list[ReplicaState]) -> float | None:
    """Available blocks of groups that could admit another, starved group's head-of-line request / all blocks.

    Attention groups of one replica are groups as well: they share a queue, so the request is the same, but each has
    its own KV. None: no replica has reported yet.
    """
    groups = [(replica, group) for replica in replicas for group in replica.groups]
    total = sum(group.total_blocks for _, group in groups)
    starved = [(replica, group) for replica, group in groups if _is_starved(group)]
    if not total:
        return None
    stranded = sum(
        group.available_blocks
        for _, group in groups
        if any(_could_admit(group, other.head_of_line_blocks) for other, lacking in starved if lacking is not group)
    )
    return stranded / total


def weight_replication_bytes(replicas: list[ReplicaState]) -> int:
    """Bytes that all replicas hold less one copy of the model."""
    return sum(replica.held_weight_bytes for replica in replicas) - replicas[0].unique_weight_bytes


def capacity_trap(replicas: list[ReplicaState]) -> int | None:
    """1 if any replica is in the trap, 0 if all are known not to be, None otherwise."""
    states = {replica.trapped for replica in replicas}
    if True in states:
        return 1
    return None if None in states else 0


def _is_starved(group: GroupState) -> bool:
    return group.starved_seconds_ago is not None and group.starved_seconds_ago <= STARVED_WITHIN_S


def _could_admit(group: GroupState, num_blocks: int) -> bool:
    """Blocks that are free now and will be needed by who runs are no room for another."""
    room = group.available_blocks if group.spare_blocks is None else min(group.available_blocks, group.spare_blocks)
    return group.has_seat and 0 < num_blocks <= room


def _known(values: Iterable[tuple[str, float | None]]) -> list[tuple[Labels, float]]:
    return [((name,), value) for name, value in values if value is not None]
