"""The members of a group as one of them sees them: who they are, and whether their processes live."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence

from ridgewalk.parallel.roster import Member

_DYING_S = 0.1
"""A process that is killed closes its connections a little before it has ended."""


class Peers:
    """Watches the processes on this host."""

    def __init__(self, rank: int, ranks: Sequence[int], roster: Sequence[Member]) -> None:
        """``rank`` is this one's and ``ranks`` are the group's, in the replica's mesh; the roster has all of that."""
        self.rank = rank
        self.ranks = tuple(ranks)
        self.index = self.ranks.index(rank)
        own = roster[rank]
        # 0: nothing to watch, a thread of this process or on another host
        self.pids = [
            member.pid if member.host == own.host and member.pid != own.pid else 0
            for member in (roster[each] for each in ranks)
        ]
        self.pidfds = [_pidfd(pid) for pid in self.pids]

    @property
    def size(self) -> int:
        """How many members there are."""
        return len(self.ranks)

    def who_is_lost(self) -> str:
        """For messages, after a connection broke."""
        poll = select.poll()
        for pidfd in self.pidfds:
            if pidfd >= 0:
                poll.register(pidfd, select.POLLIN)
        ended = {pidfd for pidfd, _ in poll.poll(_DYING_S * 1e3)}
        for rank, pidfd in zip(self.ranks, self.pidfds, strict=True):
            if pidfd in ended:
                return f"the process of rank {rank} died"
        others = ", ".join(str(rank) for rank in self.ranks if rank != self.rank)
        return f"a peer left the group or did not answer (one of {others})"

    def close(self) -> None:
        """Stop watching."""
        for pidfd in self.pidfds:
            if pidfd >= 0:
                os.close(pidfd)
        self.pidfds = [-1] * self.size


def _pidfd(pid: int) -> int:
    if pid == 0 or not hasattr(os, "pidfd_open"):
        return -1
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1  # in a shared segment the C++ side asks by process id instead
