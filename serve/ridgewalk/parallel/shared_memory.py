"""Collectives between CPU ranks of one host through shared memory: microseconds where gloo takes a millisecond."""

from __future__ import annotations

import ctypes
import os
import secrets
from pathlib import Path

import torch

from ridgewalk.kernels.cpu_kernels import DTYPE_CODES
from ridgewalk.parallel.communicator import CommunicationError

SLOT_BYTES = 1 << 20
"""Payload that moves at once; larger ones go in pieces. Four of them per rank pair stay in a cache."""

MAX_RANKS = 64
"""Room for peers in the C++ structure."""

SPINS = 4000
"""Looks at a peer's mailbox before sleeping, some 50 us: longer than ranks are usually apart in decode."""

_ALL_REDUCE, _ALL_GATHER, _GATHER, _BROADCAST = range(4)
_ABORTED, _TIMED_OUT = -1, -2
_FOLDER = Path("/dev/shm")


def create_segment(library: ctypes.CDLL, size: int) -> str:
    """Make the segment of a group; its path, or "" where there is no room for it (a container's small /dev/shm)."""
    library.rw_shm_bytes.restype = ctypes.c_size_t
    path = _FOLDER / f"ridgewalk-{secrets.token_hex(8)}"
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return ""
    try:
        os.posix_fallocate(file, 0, library.rw_shm_bytes(size, ctypes.c_size_t(SLOT_BYTES)))
    except OSError:
        path.unlink()
        return ""
    finally:
        os.close(file)
    return str(path)


class SharedMemoryCollectives:
    """One rank's end of a segment. A peer that dies, or closes, makes the others' calls raise `CommunicationError`."""

    def __init__(
        self, library: ctypes.CDLL, path: str, rank: int, pids: list[int], timeout_s: float, num_cores: int
    ) -> None:
        """Map the segment.

        Args:
            library: the compiled kernels.
            path: of the segment, from `create_segment`; may be unlinked once every rank has mapped it.
            rank: of this process in the group.
            pids: process of each rank, as seen from here.
            timeout_s: longest wait for a peer.
            num_cores: of the host; with more ranks than cores, waiting ranks sleep at once.

        Raises:
            CommunicationError: the segment cannot be mapped.
        """
        size = len(pids)
        others = [0 if pid == os.getpid() else pid for pid in pids]
        self._pidfds = [_pidfd(pid) for pid in others]
        array = ctypes.c_int * size
        library.rw_shm_open.restype = ctypes.c_void_p
        library.rw_shm_collective.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
        ]  # fmt: skip
        self._library = library
        self._rank = rank
        self._size = size
        self._group = ctypes.c_void_p(
            library.rw_shm_open(
                path.encode(),
                rank,
                size,
                ctypes.c_size_t(SLOT_BYTES),
                array(*others),
                array(*self._pidfds),
                ctypes.c_double(timeout_s),
                SPINS if size <= num_cores else 0,
            )
        )
        if not self._group:
            raise CommunicationError(f"rank {rank} cannot map the shared segment {path}")

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum in rank order, in FP32."""
        self._call(_ALL_REDUCE, tensor, tensor, 0, DTYPE_CODES[tensor.dtype])

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``[size, *tensor.shape]``."""
        stacked = tensor.new_empty((self._size, *tensor.shape))
        self._call(_ALL_GATHER, tensor, stacked)
        return stacked

    def gather(self, tensor: torch.Tensor, root: int) -> torch.Tensor | None:
        """``[size, *tensor.shape]`` on the root."""
        stacked = tensor.new_empty((self._size, *tensor.shape)) if self._rank == root else None
        self._call(_GATHER, tensor, stacked, root)
        return stacked

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Overwrite with the root's, in place."""
        self._call(_BROADCAST, tensor, tensor, root)

    def close(self) -> None:
        """Abort peers that still wait, and unmap."""
        if not self._group:
            return
        self._library.rw_shm_abort(self._group)
        self._library.rw_shm_close(self._group)
        self._group = ctypes.c_void_p()
        for pidfd in self._pidfds:
            if pidfd >= 0:
                os.close(pidfd)

    def _call(self, op: int, source: torch.Tensor, target: torch.Tensor | None, root: int = 0, dtype: int = 0) -> None:
        if not self._group:
            raise CommunicationError(f"rank {self._rank}: the group is closed")
        if not source.is_contiguous():
            raise ValueError("collectives want contiguous tensors")
        num_bytes = source.numel() * source.element_size()
        into = None if target is None else target.data_ptr()
        result = self._library.rw_shm_collective(self._group, op, dtype, root, source.data_ptr(), into, num_bytes)
        if result == 0:
            return
        if result == _TIMED_OUT:
            raise CommunicationError(f"rank {self._rank}: a peer did not enter the collective in time")
        if result == _ABORTED:
            raise CommunicationError(f"rank {self._rank}: a peer left the group")
        raise CommunicationError(f"rank {self._rank}: the process of rank {result - 1} died")


def _pidfd(pid: int) -> int:
    if pid == 0 or not hasattr(os, "pidfd_open"):
        return -1
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1  # the C++ side asks by process id instead
