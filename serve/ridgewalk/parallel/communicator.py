"""`Communicator`: every collective of one group of ranks goes through it, and is timed when a step is measured."""

from __future__ import annotations

from typing import Protocol

import torch

from ridgewalk.parallel.call_timer import CallTimer, num_bytes


class CommunicationError(RuntimeError):
    """A call cannot complete: a peer died, the group was aborted, or the wait ran out. The group is unusable."""


class Collectives(Protocol):
    """What moves the data: torch.distributed between hosts and GPUs, shared memory between CPU ranks of one host.

    All ranks of a group make the same calls in the same order with tensors of equal shape and dtype (in an all-to-all:
    of equal width and dtype). Sums are formed in FP32 where the payload is narrower, in an order that timing does not
    change, and are bit-identical on all ranks.
    """

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack the contiguous tensors of all ranks: ``[size, *tensor.shape]``."""

    def gather(self, tensor: torch.Tensor, root: int) -> torch.Tensor | None:
        """As `all_gather` on the root; None elsewhere."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Replace a contiguous tensor by the root's."""

    def all_to_all(self, rows: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Communicator.all_to_all`, of contiguous tensors."""

    def close(self) -> None:
        """Free the group; peers still inside a collective raise `CommunicationError`."""


class Communicator:
    """The collectives of one group. A group of one rank (``collectives`` None) moves nothing and times nothing.

    ``group`` is its name in timings; the timer is shared by the groups of a rank.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        collectives: Collectives | None,
        group: str = "tp",
        timer: CallTimer | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self._collectives = collectives
        self._group = group
        self._timer = timer or CallTimer()

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

    def all_to_all(self, rows: torch.Tensor, counts: torch.Tensor, op: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Send rows to the ranks they belong to.

        Args:
            rows: ``[N, W]`` of any dtype, sorted by destination; N may differ between ranks and be 0.
            counts: ``[size]`` int64 on the CPU: ``counts[r]`` rows go to rank r, the first ones to rank 0.
            op: its name in timings, ``dispatch`` or ``combine``.

        Returns:
            The rows that came, ``[M, W]``, ordered by source, and how many came from each rank, ``[size]`` int64 on
            the CPU. A group of one returns its arguments.

        Raises:
            ValueError: the counts do not add up to N.
        """
        if self._collectives is None:
            return rows, counts
        rows = rows.contiguous()
        started = self._enter(rows)
        received = self._collectives.all_to_all(rows, counts)
        if self._timer.running:
            sent = rows.narrow(0, 0, len(rows) - int(counts[self.rank]))
            self._leave(op, started, sent)
        return received

    def barrier(self) -> None:
        """Return once every rank of the group has entered."""
        if self._collectives is not None:
            self._collectives.all_gather(torch.zeros(1, dtype=torch.int32))

    def close(self) -> None:
        """Leave the group. Call it once, after the last collective."""
        if self._collectives is not None:
            self._collectives.close()

    def _enter(self, tensor: torch.Tensor) -> float:
        return self._timer.now(tensor.device) if self._timer.running else 0.0

    def _leave(self, op: str, started: float, tensor: torch.Tensor) -> None:
        if self._timer.running:
            self._timer.add(op, self._timer.now(tensor.device) - started, num_bytes(tensor), self._group)
