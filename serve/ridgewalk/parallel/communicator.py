"""`Communicator`: every collective of one group of ranks goes through it, and is timed when a step is measured."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

import torch


class CommunicationError(RuntimeError):
    """A collective cannot complete: a peer died, the group was aborted, or the wait ran out. The group is unusable."""


class TimedCollective(NamedTuple):
    """One collective call on this rank."""

    op: str  # all_reduce | all_gather | gather | broadcast
    seconds: float  # from entering the call to leaving it: waiting for peers included
    num_bytes: int  # payload of this rank


class Collectives(Protocol):
    """What moves the data: torch.distributed between hosts and GPUs, shared memory between CPU ranks of one host.

    All ranks of a group make the same calls in the same order with tensors of equal shape and dtype. Sums are formed
    in FP32 where the payload is narrower, in an order that timing does not change, and are bit-identical on all ranks.
    """

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack the contiguous tensors of all ranks: ``[size, *tensor.shape]``."""

    def gather(self, tensor: torch.Tensor, root: int) -> torch.Tensor | None:
        """As `all_gather` on the root; None elsewhere."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Replace a contiguous tensor by the root's."""

    def close(self) -> None:
        """Free the group; peers still inside a collective raise `CommunicationError`."""


class Communicator:
    """The collectives of one group. A group of one rank (``collectives`` None) moves nothing and times nothing."""

    def __init__(self, rank: int, size: int, collectives: Collectives | None) -> None:
        self.rank = rank
        self.size = size
        self._collectives = collectives
        self._timed: list[TimedCollective] | None = None
        self.seconds = 0.0  # spent in collectives since `start_timing`

    def start_timing(self) -> None:
        """Time every call from here to `stop_timing`."""
        self._timed = []
        self.seconds = 0.0

    def stop_timing(self) -> list[TimedCollective]:
        """Stop timing; the calls timed, in their order."""
        timed, self._timed = self._timed or [], None
        return timed

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a contiguous tensor over the group, in place; returns it."""
        if self._collectives is not None:
            started = self._enter(tensor)
            self._collectives.all_reduce(tensor)
            self._leave("all_reduce", started, tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack a tensor of every rank: ``[size, *tensor.shape]``."""
        if self._collectives is None:
            return tensor.unsqueeze(0)
        tensor = tensor.contiguous()
        started = self._enter(tensor)
        stacked = self._collectives.all_gather(tensor)
        self._leave("all_gather", started, tensor)
        return stacked

    def gather(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor | None:
        """Stack a tensor of every rank on the root, ``[size, *tensor.shape]``; None on the other ranks."""
        if self._collectives is None:
            return tensor.unsqueeze(0)
        tensor = tensor.contiguous()
        started = self._enter(tensor)
        stacked = self._collectives.gather(tensor, root)
        self._leave("gather", started, tensor)
        return stacked

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Overwrite a contiguous tensor with the root's, in place; returns it."""
        if self._collectives is not None:
            started = self._enter(tensor)
            self._collectives.broadcast(tensor, root)
            self._leave("broadcast", started, tensor)
        return tensor

    def barrier(self) -> None:
        """Return once every rank of the group has entered."""
        if self._collectives is not None:
            self._collectives.all_gather(torch.zeros(1, dtype=torch.int32))

    def close(self) -> None:
        """Leave the group. Call it once, after the last collective."""
        if self._collectives is not None:
            self._collectives.close()

    def _enter(self, tensor: torch.Tensor) -> float:
        if self._timed is None:
            return 0.0
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        return time.perf_counter()

    def _leave(self, op: str, started: float, tensor: torch.Tensor) -> None:
        if self._timed is None:
            return
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        seconds = time.perf_counter() - started
        self._timed.append(TimedCollective(op, seconds, tensor.numel() * tensor.element_size()))
        self.seconds += seconds
