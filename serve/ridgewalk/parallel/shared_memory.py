"""Collectives between CPU ranks of one host through shared memory: microseconds where gloo takes a millisecond."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_size_t, c_void_p

import torch

from ridgewalk.kernels.cpu_calls import DTYPE_CODES
from ridgewalk.parallel.communicator import CommunicationError
from ridgewalk.parallel.peers import Peers
from ridgewalk.parallel.shared_segment import SLOT_BYTES, check, waiting_arguments

_ALL_REDUCE, _ALL_GATHER, _GATHER, _BROADCAST = range(4)
_INVALID = -4


def segment_bytes(library: ctypes.CDLL, size: int) -> int:
    """Of the segment of a group of ``size`` ranks."""
    library.rw_shm_bytes.restype = c_size_t
    return library.rw_shm_bytes(size, c_size_t(SLOT_BYTES))


class SharedMemoryCollectives:
    """One rank's end of a segment. A peer that dies, or closes, makes the others' calls raise `CommunicationError`."""

    def __init__(self, library: ctypes.CDLL, path: str, peers: Peers, timeout_s: float, spin: bool) -> None:
        """Map the segment at ``path``, of `segment_bytes`. For the others see `waiting_arguments`.

        Raises:
            CommunicationError: it cannot be mapped.
        """
        library.rw_shm_open.restype = c_void_p
        library.rw_shm_collective.argtypes = [c_void_p, c_int, c_int, c_int, c_void_p, c_void_p, c_size_t]
        library.rw_shm_all_to_all_begin.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t, c_void_p, c_void_p]
        library.rw_shm_all_to_all_finish.argtypes = [c_void_p, c_void_p, c_void_p]
        self._library = library
        self._peers = peers
        waiting = waiting_arguments(peers, timeout_s, spin)
        self._group = c_void_p(
            library.rw_shm_open(path.encode(), peers.index, peers.size, c_size_t(SLOT_BYTES), *waiting)
        )
        if not self._group:
            raise CommunicationError(f"rank {peers.rank} cannot map the shared segment {path}")

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum in rank order, in FP32."""
        self._call(_ALL_REDUCE, tensor, tensor, 0, DTYPE_CODES[tensor.dtype])

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``[size, *tensor.shape]``."""
        stacked = tensor.new_empty((self._peers.size, *tensor.shape))
        self._call(_ALL_GATHER, tensor, stacked)
        return stacked

    def gather(self, tensor: torch.Tensor, root: int) -> torch.Tensor | None:
        """``[size, *tensor.shape]`` on the root."""
        stacked = tensor.new_empty((self._peers.size, *tensor.shape)) if self._peers.index == root else None
        self._call(_GATHER, tensor, stacked, root)
        return stacked

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Overwrite with the root's, in place."""
        self._call(_BROADCAST, tensor, tensor, root)

    def all_to_all(self, rows: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One exchange brings the counts and, as far as a slot has room, the rows."""
        num_rows, width = rows.shape
        self._check_open(rows)
        received = torch.empty(self._peers.size, dtype=torch.int64)
        if counts.dtype != received.dtype or counts.shape != received.shape or not counts.is_contiguous():
            raise ValueError(f"counts must be {self._peers.size} contiguous int64 on the CPU")
        source = rows.data_ptr()
        result = self._library.rw_shm_all_to_all_begin(
            self._group, source, num_rows, width * rows.element_size(), counts.data_ptr(), received.data_ptr()
        )
        if result == _INVALID:
            raise ValueError(f"{num_rows} rows, but the counts by destination are {counts.tolist()}")
        check(result, self._peers)
        arrived = rows.new_empty((int(received.sum()), width))
        result = self._library.rw_shm_all_to_all_finish(self._group, source, arrived.data_ptr())
        check(result, self._peers)
        return arrived, received

    def close(self) -> None:
        """Abort peers that still wait, and unmap."""
        if not self._group:
            return
        self._library.rw_shm_abort(self._group)
        self._library.rw_shm_close(self._group)
        self._group = c_void_p()
        self._peers.close()

    def _call(self, op: int, source: torch.Tensor, target: torch.Tensor | None, root: int = 0, dtype: int = 0) -> None:
        self._check_open(source)
        num_bytes = source.numel() * source.element_size()
        into = None if target is None else target.data_ptr()
        result = self._library.rw_shm_collective(self._group, op, dtype, root, source.data_ptr(), into, num_bytes)
        check(result, self._peers)

    def _check_open(self, tensor: torch.Tensor) -> None:
        if not self._group:
            raise CommunicationError(f"rank {self._peers.rank}: the group is closed")
        if not tensor.is_contiguous():
            raise ValueError("collectives want contiguous tensors")
