"""Wait and transfer: what a collective cost by itself, and what the late ranks added to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ridgewalk.engine.step import CollectiveTiming, RankTimings
    from ridgewalk.placement.mesh import Mesh

CollectiveKey = tuple[str, str, str, str]
"""``(op, phase, group, rank)``: phase being wait or transfer, group tp, ep or pp."""

_Seconds = defaultdict[CollectiveKey, list[float]]
_Calls = dict[int, "list[CollectiveTiming]"]  # by rank


def split_collectives(ranks: Sequence[RankTimings], mesh: Mesh) -> dict[CollectiveKey, list[float]]:
    """Seconds of every call of one measured step.

    For one collective, i.e. one position in the lists of the ranks of a group, ``transfer`` is the shortest duration
    and a rank's ``wait`` its own duration less that: the last rank to enter waits for nobody. Of a link between
    stages the receiver's duration is all transfer, because its wait for input is bubble and was not timed; what the
    sender's exceeds it by is wait for room. A group whose lists are not of the same calls, or that is not complete,
    says nothing and is left out.
    """
    seconds: _Seconds = defaultdict(list)
    for group, members in (("tp", _tp_groups(mesh)), ("ep", _stages(mesh) if mesh.expert_parallel else ())):
        calls = _calls(ranks, group)
        for group_ranks in members:
            _split_group(group, calls, group_ranks, seconds)
    calls, stage_size = _calls(ranks, "pp"), mesh.dp * mesh.tp
    for sender in range(mesh.world_size - stage_size):
        _split_link(calls, sender, sender + stage_size, seconds)
    return seconds


def _tp_groups(mesh: Mesh) -> Iterator[range]:
    return (range(first, first + mesh.tp) for first in range(0, mesh.world_size, mesh.tp))


def _stages(mesh: Mesh) -> Iterator[range]:
    size = mesh.dp * mesh.tp
    return (range(first, first + size) for first in range(0, mesh.world_size, size))


def _calls(ranks: Sequence[RankTimings], group: str) -> _Calls:
    return {timings.rank: [call for call in timings.collectives if call.group == group] for timings in ranks}


def _split_group(group: str, calls: _Calls, ranks: range, seconds: _Seconds) -> None:
    if not all(rank in calls for rank in ranks):
        return
    ops = [call.op for call in calls[ranks[0]]]
    if any([call.op for call in calls[rank]] != ops for rank in ranks[1:]):
        return
    shortest = [min(call.seconds for call in each) for each in zip(*(calls[rank] for rank in ranks), strict=True)]
    for rank in ranks:
        series = {op: _series(seconds, op, group, rank) for op in set(ops)}
        for op, call, transfer in zip(ops, calls[rank], shortest, strict=True):
            transfers, waits = series[op]
            transfers.append(transfer)
            waits.append(call.seconds - transfer)


def _split_link(calls: _Calls, sender: int, receiver: int, seconds: _Seconds) -> None:
    sent = [call.seconds for call in calls.get(sender, ()) if call.op == "send"]
    received = [call.seconds for call in calls.get(receiver, ()) if call.op == "recv"]
    if not sent or len(sent) != len(received):
        return
    shortest = [min(pair) for pair in zip(sent, received, strict=True)]
    for op, rank, own, transfer in (("send", sender, sent, shortest), ("recv", receiver, received, received)):
        transfers, waits = _series(seconds, op, "pp", rank)
        transfers += transfer
        waits += [each - moving for each, moving in zip(own, transfer, strict=True)]


def _series(seconds: _Seconds, op: str, group: str, rank: int) -> tuple[list[float], list[float]]:
    """Transfers and waits."""
    return seconds[op, "transfer", group, str(rank)], seconds[op, "wait", group, str(rank)]
