"""Segments of shared memory between CPU ranks of one host, and what ends a wait in them."""

from __future__ import annotations

import ctypes
import os
import secrets
from pathlib import Path

from ridgewalk.parallel.communicator import CommunicationError
from ridgewalk.parallel.peers import Peers

SLOT_BYTES = 1 << 20
"""Payload that moves at once; larger ones go in pieces. Four of them per rank pair stay in a cache."""

MAX_RANKS = 64
"""Room for peers in the C++ structures."""

_SPINS = 4000
"""Looks at a peer's counter before sleeping, some 50 us: longer than ranks are usually apart in decode."""

_ABORTED, _TIMED_OUT, _MISMATCH = -1, -2, -3
_FOLDER = Path("/dev/shm")


def create_segment(num_bytes: int) -> str:
    """Make a zeroed file; its path, or "" where there is no room for it (a container's small /dev/shm).

    May be unlinked once every rank has mapped it: it then goes with the last of them, however that ends.
    """
    path = _FOLDER / f"ridgewalk-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return ""
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError:
        path.unlink()
        return ""
    finally:
        os.close(file)
    return str(path)


def waiting_arguments(peers: Peers, timeout_s: float, spin: bool) -> tuple[object, ...]:
    """The last arguments of the C++ functions that map a segment: whom to watch, and how to wait for them.

    ``timeout_s`` is the longest wait for a peer. With ``spin`` a rank looks for its peers a while before it sleeps;
    with more ranks than cores that would keep them waiting.
    """
    array = ctypes.c_int * peers.size
    return array(*peers.pids), array(*peers.pidfds), ctypes.c_double(timeout_s), _SPINS if spin else 0


def check(result: int, peers: Peers) -> None:
    """Raise what a C++ call's result means.

    Raises:
        CommunicationError: it is not 0.
    """
    if result == 0:
        return
    meanings = {
        _TIMED_OUT: "a peer did not answer in time",
        _ABORTED: "a peer left the group",
        _MISMATCH: "a peer's tensor has another size than this rank's",
    }
    meaning = meanings.get(result) or f"the process of rank {peers.ranks[result - 1]} died"
    raise CommunicationError(f"rank {peers.rank}: {meaning}")
