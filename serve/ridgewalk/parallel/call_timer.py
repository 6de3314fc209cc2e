"""Timing of collectives and of transfers between stages, in one list over all groups of a rank."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch


class TimedCollective(NamedTuple):
    """One call on this rank."""

    op: str  # all_reduce | all_gather | gather | broadcast | dispatch | combine | send | recv
    seconds: float  # from entering the call to leaving it: waiting for peers included, but for a recv's wait for input
    num_bytes: int  # payload of this rank: what it contributes, sends (rows it keeps excluded) or receives
    group: str = "tp"  # tp | ep | pp


class CallTimer:
    """Collects the calls of a measured step. Not running it costs one comparison a call."""

    def __init__(self) -> None:
        self.running = False
        self.seconds = 0.0  # spent in the calls since `start`
        self._calls: list[TimedCollective] = []

    def start(self) -> None:
        """Time every call from here to `stop`."""
        self.running = True
        self.seconds = 0.0
        self._calls = []

    def stop(self) -> list[TimedCollective]:
        """The calls timed, in their order."""
        self.running = False
        calls, self._calls = self._calls, []
        return calls

    def now(self, device: torch.device) -> float:
        """Seconds, once the device has done what it was given: call it only while the timer runs."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()

    def add(self, op: str, seconds: float, num_bytes: int, group: str) -> None:
        """Take in a call."""
        self._calls.append(TimedCollective(op, seconds, num_bytes, group))
        self.seconds += seconds


def num_bytes(tensor: torch.Tensor) -> int:
    """Of the elements of a tensor."""
    return tensor.numel() * tensor.element_size()
