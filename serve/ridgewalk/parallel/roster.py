"""Who the ranks of a replica are: which of them can share memory."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist


@dataclass(frozen=True)
class Member:
    """One rank's process."""

    host: str  # equal for two processes exactly when they can share memory and see each other's process ids
    pid: int
    can_share: bool  # it has the compiled kernels


def exchange_members(store: dist.Store, rank: int, world_size: int, can_share: bool) -> tuple[Member, ...]:
    """All ranks, in their order. Blocks until every rank does the same."""
    own = Member(host_identity(), os.getpid(), can_share)
    store.set(f"member{rank}", json.dumps(asdict(own)))
    return tuple(Member(**json.loads(store.get(f"member{peer}"))) for peer in range(world_size))


def share_memory(members: Sequence[Member]) -> bool:
    """True if these can: they all decide alike."""
    return all(member.can_share for member in members) and len({member.host for member in members}) == 1


def host_identity() -> str:
    """Names the host and the namespaces of this process."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id",):
        if Path(path).exists():
            parts.append(Path(path).read_text().strip())
    for namespace in ("pid", "ipc", "mnt"):
        link = f"/proc/self/ns/{namespace}"
        if os.path.islink(link):
            parts.append(os.readlink(link))
    return "|".join(parts)
