"""Rates of calls, measured on all ranks at once and little disturbed by other programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ridgewalk.parallel.communicator import Communicator


@dataclass(frozen=True)
class Effort:
    """How long each figure is measured."""

    samples: int
    sample_s: float


@dataclass(frozen=True)
class Stopwatch:
    """Times calls while every rank of a group makes the same ones: they share memory bandwidth and caches.

    Another program's turn on a core only adds to a sample, so that the lower ones are the machine's own.
    """

    ranks: Communicator
    effort: Effort

    def seconds_per_call(self, call: Callable[[], object]) -> float:
        """Of calls in a row, for as long as a sample takes: the lower quartile of the samples."""
        call()
        samples = [self._sample(call) for _ in range(self.effort.samples)]
        return lower_quartile(samples)

    def seconds_together(self, call: Callable[[], object], calls: int) -> float:
        """Of a call that all ranks must make equally often, so many times a sample: the lower quartile too."""
        samples = []
        for _ in range(self.effort.samples + 1):
            self.ranks.barrier()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            samples.append((time.perf_counter() - began) / calls)
        return lower_quartile(samples[1:])

    def seconds_meeting(
        self, compute: Callable[[], object], meet: Callable[[], object], calls: int
    ) -> tuple[float, float]:
        """What passes from one meeting of all ranks to the next, and what this rank computes meanwhile. Means."""
        computed = 0.0
        self.ranks.barrier()
        began = time.perf_counter()
        for _ in range(calls):
            before = time.perf_counter()
            compute()
            computed += time.perf_counter() - before
            meet()
        return (time.perf_counter() - began) / calls, computed / calls

    def _sample(self, call: Callable[[], object]) -> float:
        self.ranks.barrier()
        began = time.perf_counter()
        calls, spent = 0, 0.0
        while not calls or spent < self.effort.sample_s:
            call()
            calls, spent = calls + 1, time.perf_counter() - began
        return spent / calls


def lower_quartile(samples: Sequence[float]) -> float:
    """The sample that a quarter of them are under."""
    return sorted(samples)[len(samples) // 4]
