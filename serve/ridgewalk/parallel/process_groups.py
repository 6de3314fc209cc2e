"""From a mesh to the groups of ranks that talk to each other."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from ridgewalk.parallel.call_timer import CallTimer, TimedCollective
from ridgewalk.parallel.communicator import Communicator
from ridgewalk.parallel.connector import Connector
from ridgewalk.parallel.roster import exchange_members
from ridgewalk.parallel.stage_link import StageLink
from ridgewalk.placement.mesh import Mesh


@dataclass(frozen=True)
class ProcessGroups:
    """The groups and links that one rank belongs to."""

    tp: Communicator  # the ranks that share one shard of layers: all-reduce after attention and MLP
    ep: Communicator  # the ranks of a stage, if they share its experts: dispatch and combine; otherwise of size 1
    previous: StageLink | None = None  # receives from the rank at this one's place in the stage before
    next: StageLink | None = None  # sends to the one in the stage after
    timer: CallTimer = field(default_factory=CallTimer)  # of all of them

    @property
    def seconds(self) -> float:
        """Spent in timed calls since `start_timing`."""
        return self.timer.seconds

    def start_timing(self) -> None:
        """Time every call of every group from here to `stop_timing`."""
        self.timer.start()

    def stop_timing(self) -> list[TimedCollective]:
        """Stop timing; the calls timed, in their order."""
        return self.timer.stop()

    def close(self) -> None:
        """Leave every group, so that no peer waits for this rank any longer. Call it once, after the last call."""
        for each in (self.tp, self.ep, self.previous, self.next):
            if each is not None:
                each.close()


def make_process_groups(
    mesh: Mesh,
    rank: int,
    init_method: str,
    device: torch.device,
    library: ctypes.CDLL | None = None,
    timeout_s: float = 600.0,
) -> ProcessGroups:
    """Connect this rank with its peers. Every rank of the mesh must call it.

    Args:
        mesh: the replica's mesh.
        rank: flat rank in the mesh.
        init_method: where ranks meet: ``tcp://host:port`` (rank 0 listens there) or ``file:///path`` (one host; the
            file must not exist before). Not read by a mesh of one rank.
        device: of the tensors to be exchanged.
        library: the compiled kernels, for shared memory between the CPU ranks of one host; without them, gloo.
        timeout_s: after so long without an answer from a peer, a call raises `CommunicationError`.

    Raises:
        ValueError: ``init_method`` is neither of these.
    """
    _, stage, tp_rank = mesh.coordinates(rank)
    timer = CallTimer()
    if mesh.world_size == 1:
        return ProcessGroups(Communicator(0, 1, None, "tp", timer), Communicator(0, 1, None, "ep", timer), timer=timer)
    store = _store(init_method, rank, mesh.world_size, timeout_s)
    members = exchange_members(store, rank, mesh.world_size, library is not None)
    connector = Connector(store, rank, members, device, library, timeout_s, timer)
    stage_size = mesh.dp * mesh.tp
    tp_ranks = range(rank - tp_rank, rank - tp_rank + mesh.tp)
    ep_ranks = range(stage * stage_size, (stage + 1) * stage_size) if mesh.expert_parallel else range(rank, rank + 1)
    groups = ProcessGroups(
        tp=connector.communicator("tp", tp_ranks),
        ep=connector.communicator("ep", ep_ranks),
        # in this order: the first stage has only the second link, so that the chain of pairs unrolls from there
        previous=connector.link(rank - stage_size, rank) if stage > 0 else None,
        next=connector.link(rank, rank + stage_size) if stage + 1 < mesh.pp else None,
        timer=timer,
    )
    connector.finish()
    return groups


def _store(init_method: str, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    if init_method.startswith("file://"):
        return dist.FileStore(init_method.removeprefix("file://"), world_size)
    if init_method.startswith("tcp://"):
        host, _, port = init_method.removeprefix("tcp://").rpartition(":")
        if host and port.isdigit():
            timeout = timedelta(seconds=timeout_s)
            return dist.TCPStore(host, int(port), world_size, rank == 0, timeout, wait_for_workers=False)
    raise ValueError(f"init_method must be tcp://host:port or file:///path, got {init_method!r}")
