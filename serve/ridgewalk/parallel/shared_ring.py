"""The pipe of a stage link through shared memory, between CPU ranks of one host."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_size_t, c_uint32, c_void_p

import torch

from ridgewalk.parallel.call_timer import num_bytes
from ridgewalk.parallel.communicator import CommunicationError
from ridgewalk.parallel.peers import Peers
from ridgewalk.parallel.shared_segment import SLOT_BYTES, check, waiting_arguments

RING_SLOTS = 4
"""Tensors up to a slot's size that a sender may be ahead; larger ones take several. A power of two."""


def ring_bytes(library: ctypes.CDLL) -> int:
    """Of the segment of a ring."""
    library.rw_ring_bytes.restype = c_size_t
    return library.rw_ring_bytes(c_uint32(RING_SLOTS), c_size_t(SLOT_BYTES))


class SharedMemoryRing:
    """One end of a ring; the first of the peers sends, the second receives. A `Pipe`."""

    def __init__(self, library: ctypes.CDLL, path: str, peers: Peers, timeout_s: float, spin: bool) -> None:
        """Map the segment at ``path``, of `ring_bytes`. For the others see `waiting_arguments`.

        Raises:
            CommunicationError: it cannot be mapped.
        """
        library.rw_ring_open.restype = c_void_p
        library.rw_ring_send.argtypes = [c_void_p, c_void_p, c_size_t]
        library.rw_ring_recv.argtypes = [c_void_p, c_void_p, c_size_t]
        library.rw_ring_await.argtypes = [c_void_p, POINTER(c_double)]
        self._library = library
        self._peers = peers
        self._waited = c_double(0.0)
        waiting = waiting_arguments(peers, timeout_s, spin)
        self._ring = c_void_p(
            library.rw_ring_open(path.encode(), peers.index, c_uint32(RING_SLOTS), c_size_t(SLOT_BYTES), *waiting)
        )
        if not self._ring:
            raise CommunicationError(f"rank {peers.rank} cannot map the shared segment {path}")

    @property
    def bubble_seconds(self) -> float:
        """Time that `await_input` waited."""
        return self._waited.value

    def send(self, tensor: torch.Tensor) -> None:
        """Copy into the ring; waits while it is full."""
        check(self._library.rw_ring_send(self._open(), tensor.data_ptr(), num_bytes(tensor)), self._peers)

    def await_input(self) -> None:
        """Wait for a tensor or its first piece."""
        check(self._library.rw_ring_await(self._open(), byref(self._waited)), self._peers)

    def recv(self, tensor: torch.Tensor) -> None:
        """Copy out of the ring; waits for further pieces."""
        check(self._library.rw_ring_recv(self._open(), tensor.data_ptr(), num_bytes(tensor)), self._peers)

    def close(self) -> None:
        """Make the peer's waits end, and unmap."""
        if self._ring:
            self._library.rw_ring_abort(self._ring)
            self._library.rw_ring_close(self._ring)
            self._ring = c_void_p()
            self._peers.close()

    def _open(self) -> c_void_p:
        if not self._ring:
            raise CommunicationError(f"rank {self._peers.rank}: the link is closed")
        return self._ring
