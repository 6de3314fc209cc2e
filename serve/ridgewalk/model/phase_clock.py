"""Where the time of a measured step goes."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from ridgewalk.parallel.process_groups import ProcessGroups

COLLECTIVE = "collective"
"""The phase of time spent inside collectives, sends and receives."""

BUBBLE = "bubble"
"""The phase of time spent waiting for the previous pipeline stage's output."""


class PhaseClock:
    """Adds up seconds by phase; time inside collectives and waits for a stage's input are phases of their own.

    The phases add up to the step. Costs nothing while it is not running. On CUDA the moments are events in the stream,
    so that looking does not stop the device (timing a collective does).
    """

    def __init__(self, groups: ProcessGroups, device: torch.device) -> None:
        self._groups = groups
        self._on_gpu = device.type == "cuda"
        self._running = False
        self._marks: list[tuple[str, float | torch.cuda.Event, dict[str, float]]] = []
        self.phases: dict[str, float] = {}

    def start(self) -> None:
        """Begin a measured step, after the groups' timing was started."""
        self._running = True
        self._marks = [("", self._now(), self._read())]

    def stop(self) -> float:
        """End it; the seconds it took."""
        self._running = False
        self.phases = {}
        for (_, then, before), (phase, now, inside) in pairwise(self._marks):
            own = _seconds(then, now)
            for name, seconds in inside.items():
                elsewhere = seconds - before[name]
                own -= elsewhere
                if elsewhere:
                    self._add(name, elsewhere)
            self._add(phase, own)
        return sum(self.phases.values())

    def mark(self, phase: str) -> None:
        """Everything since the last mark was ``phase``, but for collectives and waits for input in between."""
        if self._running:
            self._marks.append((phase, self._now(), self._read()))

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, phase: str, seconds: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def _read(self) -> dict[str, float]:
        """The groups' readings."""
        previous = self._groups.previous
        return {COLLECTIVE: self._groups.seconds, BUBBLE: previous.bubble_seconds if previous else 0.0}


def _seconds(then: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    if isinstance(then, float) and isinstance(now, float):
        return now - then
    assert isinstance(then, torch.cuda.Event)
    assert isinstance(now, torch.cuda.Event)
    now.synchronize()
    return then.elapsed_time(now) / 1000
