"""Times of calls, measured on all ranks at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from ridgewalk.parallel.communicator import Communicator


class Sample(NamedTuple):
    """Calls in a row."""

    seconds: float  # of all of them
    calls: int

    @property
    def per_call(self) -> float:
        """Seconds."""
        return self.seconds / self.calls


@dataclass(frozen=True)
class Stopwatch:
    """Times calls while every rank of a group makes the same ones: they share memory bandwidth and caches."""

    ranks: Communicator
    sample_s: float

    def sample(self, call: Callable[[], object]) -> Sample:
        """Of calls in a row, for as long as a sample takes, after one that is not measured."""
        call()
        self.ranks.barrier()
        began = time.perf_counter()
        calls, spent = 0, 0.0
        while not calls or spent < self.sample_s:
            call()
            calls, spent = calls + 1, time.perf_counter() - began
        return Sample(spent, calls)

    def seconds_together(self, call: Callable[[], object], calls: int) -> float:
        """Of a call that all ranks must make equally often: the mean of so many, after as many unmeasured ones."""
        for _ in range(2):
            self.ranks.barrier()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            spent = time.perf_counter() - began
        return spent / calls

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


def interruptions(figures: Sequence[Sequence[Sample]]) -> float:
    """By what share calls take longer in the mean than in the median sample, over many figures. Not negative.

    A figure's mean is all its time over all its calls: a sample that was interrupted has fewer of them.
    """
    return max(0.0, fmean(_mean(each) / median(sample.per_call for sample in each) for each in figures) - 1)


def _mean(samples: Sequence[Sample]) -> float:
    return sum(sample.seconds for sample in samples) / sum(sample.calls for sample in samples)
