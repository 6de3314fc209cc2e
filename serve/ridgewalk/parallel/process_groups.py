"""From a mesh to the groups of ranks that talk to each other."""

from __future__ import annotations

import ctypes
import json
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ridgewalk.parallel.communicator import Communicator
from ridgewalk.parallel.shared_memory import MAX_RANKS, SharedMemoryCollectives, create_segment
from ridgewalk.parallel.torch_collectives import TorchCollectives
from ridgewalk.placement.mesh import Mesh


@dataclass(frozen=True)
class ProcessGroups:
    """The groups that one rank belongs to."""

    tp: Communicator  # the ranks that share one shard of layers: all-reduce after attention and MLP

    def close(self) -> None:
        """Leave every group."""
        self.tp.close()


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
        timeout_s: after so long without an answer from a peer, a collective raises `CommunicationError`.

    Raises:
        ValueError: ``init_method`` is neither of these.
    """
    _, _, tp_rank = mesh.coordinates(rank)
    if mesh.world_size == 1:
        return ProcessGroups(tp=Communicator(0, 1, None))
    store = _store(init_method, rank, mesh.world_size, timeout_s)
    return ProcessGroups(tp=_communicator(store, "tp", tp_rank, mesh.tp, device, library, timeout_s))


def _communicator(
    store: dist.Store,
    name: str,
    rank: int,
    size: int,
    device: torch.device,
    library: ctypes.CDLL | None,
    timeout_s: float,
) -> Communicator:
    shared = None
    if device.type == "cpu":
        shared = _shared_memory(dist.PrefixStore(f"{name}-shm", store), rank, size, library, timeout_s)
    collectives = shared or TorchCollectives(store, rank, size, device, timeout_s, name)
    return Communicator(rank, size, collectives)


def _shared_memory(
    store: dist.Store, rank: int, size: int, library: ctypes.CDLL | None, timeout_s: float
) -> SharedMemoryCollectives | None:
    """Shared memory, if all ranks are on one host and can use it: they all decide alike."""
    able = library is not None and size <= MAX_RANKS
    store.set(f"member{rank}", json.dumps([able, host_identity(), os.getpid()]))
    members = [json.loads(store.get(f"member{peer}")) for peer in range(size)]
    if not all(able for able, _, _ in members) or len({host for _, host, _ in members}) > 1 or library is None:
        return None
    if rank == 0:
        store.set("segment", create_segment(library, size))
    path = store.get("segment").decode()
    if not path:
        return None
    pids = [pid for _, _, pid in members]
    collectives = SharedMemoryCollectives(library, path, rank, pids, timeout_s, len(os.sched_getaffinity(0)))
    store.set(f"mapped{rank}", "1")
    if rank == 0:
        store.wait([f"mapped{peer}" for peer in range(size)], timedelta(seconds=timeout_s))
        os.unlink(path)  # it lives on while it is mapped, and goes with the last rank however that ends
    return collectives


def _store(init_method: str, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    if init_method.startswith("file://"):
        return dist.FileStore(init_method.removeprefix("file://"), world_size)
    if init_method.startswith("tcp://"):
        host, _, port = init_method.removeprefix("tcp://").rpartition(":")
        if host and port.isdigit():
            timeout = timedelta(seconds=timeout_s)
            return dist.TCPStore(host, int(port), world_size, rank == 0, timeout, wait_for_workers=False)
    raise ValueError(f"init_method must be tcp://host:port or file:///path, got {init_method!r}")


def host_identity() -> str:
    """Equal for two processes exactly when they can share memory and see each other's process ids."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id",):
        if Path(path).exists():
            parts.append(Path(path).read_text().strip())
    for namespace in ("pid", "ipc", "mnt"):
        link = f"/proc/self/ns/{namespace}"
        if os.path.islink(link):
            parts.append(os.readlink(link))
    return "|".join(parts)
