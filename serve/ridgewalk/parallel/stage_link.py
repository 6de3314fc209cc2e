"""`StageLink`: activations from one pipeline stage to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ridgewalk.parallel.call_timer import CallTimer, num_bytes


class Pipe(Protocol):
    """What moves the data of a link, one way and in order. Its peer's death, leaving or silence raises
    `CommunicationError`."""

    @property
    def bubble_seconds(self) -> float:
        """Time that `await_input` waited, since the pipe was made."""

    def send(self, tensor: torch.Tensor) -> None:
        """Hand over a contiguous tensor; the caller may overwrite it afterwards."""

    def await_input(self) -> None:
        """Return once a tensor is there (on a GPU: let the stream wait for it)."""

    def recv(self, tensor: torch.Tensor) -> None:
        """Overwrite a contiguous tensor with the next one sent, which has its size."""

    def close(self) -> None:
        """Free the pipe."""


class StageLink:
    """One end of the way from a rank to the one at its place in the next stage: one sends, the other receives.

    Buffered: a sender may be some tensors ahead, so that it does not wait for the receiver to finish computing.
    """

    def __init__(self, pipe: Pipe, device: torch.device, timer: CallTimer) -> None:
        self._pipe = pipe
        self._device = device
        self._timer = timer

    @property
    def bubble_seconds(self) -> float:
        """Time that `recv` waited for its input, since the link was made."""
        return self._pipe.bubble_seconds

    def send(self, tensor: torch.Tensor) -> None:
        """Hand over a tensor; the caller may overwrite it afterwards.

        Raises:
            CommunicationError: the receiver is gone.
        """
        tensor = tensor.contiguous()
        started = self._timer.now(tensor.device) if self._timer.running else 0.0
        self._pipe.send(tensor)
        self._leave("send", started, tensor)

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor sent, which has this shape and dtype. Waiting for it is bubble, and not timed.

        Raises:
            CommunicationError: the sender is gone, or sent a tensor of another size.
        """
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        self._pipe.await_input()
        started = self._timer.now(tensor.device) if self._timer.running else 0.0
        self._pipe.recv(tensor)
        self._leave("recv", started, tensor)
        return tensor

    def close(self) -> None:
        """Leave the link. Call it once, after the last tensor has been received."""
        self._pipe.close()

    def _leave(self, op: str, started: float, tensor: torch.Tensor) -> None:
        if self._timer.running:
            self._timer.add(op, self._timer.now(tensor.device) - started, num_bytes(tensor), "pp")
