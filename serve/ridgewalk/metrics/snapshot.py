"""A process's metrics as plain data that travels to whichever ingress answers the scrape."""

from __future__ import annotations

import msgspec
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class Series(msgspec.Struct, frozen=True, array_like=True):
    """One label set of a family."""

    labels: tuple[tuple[str, str], ...]  # (name, value) in the family's order, without `le`
    values: list[float]  # parallel to the family's columns


class Family(msgspec.Struct, frozen=True, array_like=True):
    """One metric."""

    name: str  # as in the exposition: counters end in _total
    kind: str  # counter | gauge | histogram | summary
    help: str
    columns: tuple[tuple[str, str], ...]  # (suffix, le) of a series' values: ("", ""), ("_bucket", "0.1"), ("_sum", "")
    series: list[Series]


class GroupState(msgspec.Struct, frozen=True, array_like=True):
    """One attention group, for the gauges that need to see all groups of a model."""

    total_blocks: int
    available_blocks: int  # free and evictable
    has_seat: bool  # fewer sequences run than `max_num_seqs`
    starved_seconds_ago: float | None  # since it last throttled or preempted for want of KV; None: never
    spare_blocks: int | None = None  # those that nobody who runs is predicted to need; None: not predicted


class ReplicaState(msgspec.Struct, frozen=True, array_like=True):
    """What the model-wide gauges need of one replica. Ages, not times: processes share no clock."""

    model_name: str
    placement: str
    replica: str
    groups: list[GroupState]  # empty before the engine's first report
    head_of_line_blocks: int  # KV blocks that the first waiting sequence needs; 0: none waits
    held_weight_bytes: int  # of all ranks, padding excluded
    unique_weight_bytes: int  # of the model
    trapped: bool | None  # in the capacity trap; None: not known


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """One process at one moment."""

    families: list[Family]
    replica: ReplicaState | None = None  # None: an ingress


def take_snapshot(registry: Collector, replica: ReplicaState | None = None) -> Snapshot:
    """Read everything off a registry (or one collector). Safe from any thread if its collectors are."""
    return Snapshot([family_of(metric) for metric in registry.collect()], replica)


def relabeled(snapshot: Snapshot, label: str, value: str) -> Snapshot:
    """The snapshot of a process that Serve has given another rank since it started: its series carry that one.

    Serve keeps ranks contiguous, so when a process ends another may be given its rank. Were labels those of the start,
    two processes could have the same ones and be summed.
    """

    def renamed(series: Series) -> Series:
        return Series(tuple((name, value if name == label else old) for name, old in series.labels), series.values)

    families = [
        Family(each.name, each.kind, each.help, each.columns, [renamed(series) for series in each.series])
        for each in snapshot.families
    ]
    replica = snapshot.replica
    if replica is not None:
        replica = msgspec.structs.replace(replica, **{label: value})
    return Snapshot(families, replica)


def encode(snapshot: Snapshot) -> bytes:
    """As msgpack."""
    return msgspec.msgpack.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """Inverse of `encode`.

    Raises:
        msgspec.DecodeError: not a snapshot.
    """
    return msgspec.msgpack.decode(data, type=Snapshot)


def family_of(metric: Metric) -> Family:
    """A `prometheus_client` metric as data; the ``_created`` samples of its own instruments are dropped.

    Raises:
        ValueError: its series have unequal buckets.
    """
    grouped: dict[tuple[tuple[str, str], ...], tuple[list[tuple[str, str]], list[float]]] = {}
    is_counter, prefix = metric.type == "counter", len(metric.name)
    for sample in metric.samples:
        suffix = sample.name[prefix:]
        if suffix == "_created":
            continue
        labels = tuple(item for item in sample.labels.items() if item[0] != "le")
        columns, values = grouped.setdefault(labels, ([], []))
        columns.append(("" if is_counter else suffix, sample.labels.get("le", "")))
        values.append(sample.value)
    layouts = {tuple(columns) for columns, _ in grouped.values()}
    if len(layouts) > 1:
        raise ValueError(f"the series of {metric.name} have unequal buckets")
    name = f"{metric.name}_total" if is_counter else metric.name
    series = [Series(labels, values) for labels, (_, values) in grouped.items()]
    return Family(name, metric.type, metric.documentation, next(iter(layouts), ()), series)
