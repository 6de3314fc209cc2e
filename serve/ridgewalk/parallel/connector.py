"""`Connector`: makes one rank's ends of groups and links, over shared memory where their ranks can share it."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ridgewalk.parallel.call_timer import CallTimer
from ridgewalk.parallel.communicator import Communicator
from ridgewalk.parallel.peers import Peers
from ridgewalk.parallel.roster import Member, share_memory
from ridgewalk.parallel.shared_memory import SharedMemoryCollectives, segment_bytes
from ridgewalk.parallel.shared_ring import SharedMemoryRing, ring_bytes
from ridgewalk.parallel.shared_segment import MAX_RANKS, create_segment
from ridgewalk.parallel.stage_link import StageLink
from ridgewalk.parallel.torch_collectives import TorchCollectives, make_group
from ridgewalk.parallel.torch_pipe import TorchPipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connector:
    """Every rank of a group must make it; a rank that is in several makes them in an order that all agree on."""

    store: dist.Store
    rank: int  # in the replica's mesh, like all ranks here
    members: tuple[Member, ...]  # all ranks of the replica
    device: torch.device
    library: ctypes.CDLL | None
    timeout_s: float
    timer: CallTimer

    def communicator(self, group: str, ranks: Sequence[int]) -> Communicator:
        """The group of these ranks; ``group`` is its kind, for timings."""
        if len(ranks) == 1:
            return Communicator(0, 1, None, group, self.timer)
        name = f"{group}-{ranks[0]}"  # groups of one kind do not overlap
        peers = Peers(self.rank, ranks, self.members)
        collectives: SharedMemoryCollectives | TorchCollectives
        if self._can_share(ranks) and (path := self._segment(name, ranks, segment_bytes(self.library, len(ranks)))):
            collectives = SharedMemoryCollectives(self.library, path, peers, self.timeout_s, self._spin)
            self._mapped(name, ranks, path)
        else:
            collectives = TorchCollectives(self._torch_group(name, peers), peers, self.device)
        return Communicator(peers.index, peers.size, collectives, group, self.timer)

    def link(self, sender: int, receiver: int) -> StageLink:
        """The way from one rank to another; this rank is one of them."""
        ranks, name = (sender, receiver), f"pp-{sender}-{receiver}"
        peers = Peers(self.rank, ranks, self.members)
        pipe: SharedMemoryRing | TorchPipe
        if self._can_share(ranks) and (path := self._segment(name, ranks, ring_bytes(self.library))):
            pipe = SharedMemoryRing(self.library, path, peers, self.timeout_s, self._spin)
            self._mapped(name, ranks, path)
        else:
            pipe = TorchPipe(self._torch_group(name, peers), peers, self.device)
        return StageLink(pipe, self.device, self.timer)

    def finish(self) -> None:
        """Call it last. The store may live in rank 0, which therefore stays until every rank has its groups."""
        self.store.set(f"connected{self.rank}", "1")
        if self.rank == 0:
            self._await([f"connected{rank}" for rank in range(len(self.members))])

    def _can_share(self, ranks: Sequence[int]) -> bool:
        return self.device.type == "cpu" and len(ranks) <= MAX_RANKS and share_memory([self.members[r] for r in ranks])

    def _segment(self, name: str, ranks: Sequence[int], num_bytes: int) -> str:
        """Path of the segment, which the first of the ranks makes; "" if there was no room."""
        if self.rank == ranks[0]:
            made = create_segment(num_bytes)
            if not made:
                logger.warning(
                    "no room for %d MiB of shared memory: ranks %s talk through gloo, which is many times slower",
                    num_bytes >> 20, ", ".join(map(str, ranks)),
                )  # fmt: skip
            self.store.set(f"{name}-segment", made)
        return self.store.get(f"{name}-segment").decode()

    def _mapped(self, name: str, ranks: Sequence[int], path: str) -> None:
        self.store.set(f"{name}-mapped{self.rank}", "1")
        if self.rank == ranks[0]:
            self._await([f"{name}-mapped{rank}" for rank in ranks])
            os.unlink(path)

    def _await(self, keys: list[str]) -> None:
        self.store.wait(keys, timedelta(seconds=self.timeout_s))

    def _torch_group(self, name: str, peers: Peers) -> dist.ProcessGroup:
        return make_group(self.store, name, peers.index, peers.size, self.device, self.timeout_s)

    @property
    def _spin(self) -> bool:
        host = self.members[self.rank].host
        return sum(member.host == host for member in self.members) <= len(os.sched_getaffinity(0))
