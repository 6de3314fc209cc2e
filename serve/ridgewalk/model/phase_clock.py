"""Where the time of a measured step goes."""

from __future__ import annotations

import time

import torch

from ridgewalk.parallel.communicator import Communicator


class PhaseClock:
    """Adds up seconds by phase; time inside collectives is its own phase. Costs nothing while it is not running."""

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self._communicator = communicator
        self._device = device
        self._running = False
        self._last = 0.0
        self._collective_seconds = 0.0
        self.phases: dict[str, float] = {}

    def start(self) -> None:
        """Begin a measured step."""
        self.phases = {}
        self._running = True
        self._collective_seconds = 0.0
        self._last = time.perf_counter()

    def stop(self) -> float:
        """End it; the seconds it took."""
        self._running = False
        return sum(self.phases.values())

    def mark(self, phase: str) -> None:
        """Everything since the last mark was ``phase``, but for the collectives in between."""
        if not self._running:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        collective = self._communicator.seconds - self._collective_seconds
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last - collective
        if collective:
            self.phases["collective"] = self.phases.get("collective", 0.0) + collective
        self._last = now
        self._collective_seconds = self._communicator.seconds
