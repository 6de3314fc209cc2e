"""Where the time of a measured step goes."""

from __future__ import annotations

import time

import torch

from ridgewalk.parallel.process_groups import ProcessGroups

COLLECTIVE = "collective"
"""The phase of time spent inside collectives, sends and receives."""

BUBBLE = "bubble"
"""The phase of time spent waiting for the previous pipeline stage's output."""


class PhaseClock:
    """Adds up seconds by phase; time inside collectives and waits for a stage's input are phases of their own.

    The phases add up to the step. Costs nothing while it is not running.
    """

    def __init__(self, groups: ProcessGroups, device: torch.device) -> None:
        self._groups = groups
        self._device = device
        self._running = False
        self._last = 0.0
        self._inside = {COLLECTIVE: 0.0, BUBBLE: 0.0}  # the groups' readings at the last mark
        self.phases: dict[str, float] = {}

    def start(self) -> None:
        """Begin a measured step, after the groups' timing was started."""
        self._synchronize()  # else time of earlier steps would count
        self.phases = {}
        self._running = True
        self._inside = self._read()
        self._last = time.perf_counter()

    def stop(self) -> float:
        """End it; the seconds it took."""
        self._running = False
        return sum(self.phases.values())

    def mark(self, phase: str) -> None:
        """Everything since the last mark was ``phase``, but for collectives and waits for input in between."""
        if not self._running:
            return
        self._synchronize()
        now, inside = time.perf_counter(), self._read()
        own = now - self._last
        for name, seconds in inside.items():
            elsewhere = seconds - self._inside[name]
            own -= elsewhere
            if elsewhere:
                self._add(name, elsewhere)
        self._add(phase, own)
        self._last, self._inside = now, inside

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _add(self, phase: str, seconds: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def _read(self) -> dict[str, float]:
        previous = self._groups.previous
        return {COLLECTIVE: self._groups.seconds, BUBBLE: previous.bubble_seconds if previous else 0.0}
