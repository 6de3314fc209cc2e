"""How many tokens requests write: survival curves by class, learned from those that ended and those that still run.

The estimate is Kaplan and Meier's (1958) over buckets of lengths (a life table). A stop is an observation; a request
that was cut at ``max_tokens``, was aborted or still runs only says that it is longer than what it has: it is
right-censored, and left out of the risk set from there on. One that was resumed joins at the length it came with.

A class is what the scheduler can see: ``max_tokens``, the thinking budget, the effort asked for, the prompt's length.
Where a class has seen little, its hazard leans on that of the wider class, and the widest on a prior that knows
``max_tokens`` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ridgewalk.engine.length_class import LengthClass
from ridgewalk.engine.request import FinishReason, Request

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer]

PRIOR_WEIGHT = 1.0
"""Requests that the prior counts as, where nothing has been seen."""

PRIOR_SHAPE = 3
"""The prior: a length is the least of so many that are even over ``1 .. max_tokens``, so a quarter of it on average."""

BACKOFF_WEIGHT = 8.0
"""Requests that a wider class counts as, at most, beside those of the class itself."""

MEMORY = 4096
"""Ended requests after which all counts are halved: loads change."""

MAX_CLASSES = 512
"""Classes that are told apart; further ones are known by their wider classes alone."""

_ENTERED, _STOPPED, _CENSORED = range(3)


def length_grid(longest: int, step: int = 16, growth: float = 1.125) -> npt.NDArray[np.int64]:
    """Increasing lengths from 0 to ``longest`` in tokens: every ``step`` at first, then ``growth`` times the last."""
    grid = [0]
    while grid[-1] < longest:
        grid.append(min(longest, max(grid[-1] + step, int(grid[-1] * growth))))
    return np.array(grid, dtype=np.int64)


class LengthModel(Protocol):
    """What admission asks about the lengths of outputs."""

    def limits(self, requests: Sequence[Request]) -> list[int]:
        """Output tokens that each request can have at most."""
        ...

    def refresh(self, running: Sequence[Request]) -> None:
        """Take in what runs now: it says how long outputs are at least."""
        ...

    def survival(self, requests: Sequence[Request], written: Integers, times: Integers) -> Array:
        """``[len(requests), len(times)]``: chance that each request writes over so many more tokens.

        ``written``: what each has so far, ``[len(requests)]``. Of 32 bits or more, as ``times``.
        """
        ...

    def observe(self, request: Request) -> None:
        """A request ended."""
        ...


class OutputLengths:
    """Learns online. Memory is bounded: `MAX_CLASSES` times three numbers a bucket, and a prior for each power of 2."""

    def __init__(self, max_model_len: int) -> None:
        self._grid = length_grid(max_model_len)
        self.edges = self._grid.astype(np.float64)  # of `curve`
        self._counts: dict[tuple[object, ...], Array] = {(): self._no_counts()}  # entered, stopped, censored by bucket
        self._seen = dict(self._counts)  # with what runs now
        self._curves: dict[LengthClass, Array] = {}
        self._priors: dict[int, Array] = {}  # by exponent
        self._num_ended = 0

    def limits(self, requests: Sequence[Request]) -> list[int]:
        """``max_tokens``."""
        return [request.sampling.max_tokens for request in requests]

    def observe(self, request: Request) -> None:
        """Count a request that ended."""
        stopped = request.finish_reason is FinishReason.STOP
        self.observe_length(request.length_class, request.num_resumed_tokens, request.num_output_tokens, stopped)

    def observe_length(self, kind: LengthClass, first: int, last: int, stopped: bool) -> None:
        """Count an output that was followed from ``first`` tokens on to ``last``; not ``stopped``: it was cut there."""
        row = _STOPPED if stopped else _CENSORED
        entered, ended = self._buckets([first, last])
        for key in kind.lineage:
            counts = self._counts.get(key)
            if counts is None:
                if len(self._counts) >= MAX_CLASSES:
                    break
                counts = self._counts[key] = self._no_counts()
            counts[_ENTERED, entered] += 1
            counts[row, ended] += 1
        self._num_ended += 1
        if self._num_ended >= MEMORY:
            self._num_ended //= 2
            for counts in self._counts.values():
                counts /= 2

    def refresh(self, running: Sequence[Request]) -> None:
        """Estimate anew, with what runs now as censored."""
        opened: dict[LengthClass, list[tuple[int, int]]] = {}
        for each in running:  # not by way of `refresh_with`, which takes a quarter longer: due whenever one ends
            written = len(each.token_ids) - each.num_prompt_tokens
            opened.setdefault(each.length_class, []).append((each.num_resumed_tokens, written))
        self._take_in(opened)

    def refresh_with(self, running: Iterable[tuple[LengthClass, int, int]]) -> None:
        """As `refresh`: class, tokens that it came with, and tokens so far, of each output."""
        opened: dict[LengthClass, list[tuple[int, int]]] = {}
        for kind, first, last in running:
            opened.setdefault(kind, []).append((first, last))
        self._take_in(opened)

    def _take_in(self, opened: Mapping[LengthClass, Sequence[tuple[int, int]]]) -> None:
        self._seen = dict(self._counts)
        added: set[tuple[object, ...]] = set()
        for kind, lengths in opened.items():
            entered, censored = map(self._count, zip(*lengths, strict=True))
            for key in kind.lineage:
                if key not in added:
                    added.add(key)
                    self._seen[key] = self._counts[key].copy() if key in self._counts else self._no_counts()
                self._seen[key][_ENTERED] += entered
                self._seen[key][_CENSORED] += censored
        self._curves = {}

    def survival(self, requests: Sequence[Request], written: Integers, times: Integers) -> Array:
        """As `LengthModel`. A request without stop tokens is taken to run to its limit."""
        alive = np.ones((len(requests), len(times)))
        by_class: dict[LengthClass, list[int]] = {}
        for index, request in enumerate(requests):
            if request.sampling.stop_token_ids:
                by_class.setdefault(request.length_class, []).append(index)
        for kind, rows in by_class.items():
            curve = self.curve(kind)
            have = written[rows]
            now = np.interp(have, self.edges, curve)
            then = np.interp(have[:, None] + times[None, :], self.edges, curve)
            alive[rows] = then / np.maximum(now, 1e-12)[:, None]
        return alive

    def curve(self, kind: LengthClass) -> Array:
        """Chance that an output of the class is longer than each edge of the grid."""
        if kind not in self._curves:
            self._curves[kind] = np.concatenate(([1.0], np.cumprod(1.0 - self._hazard(kind))))
        return self._curves[kind]

    def _hazard(self, kind: LengthClass) -> Array:
        """Chance to stop within each bucket, of those that reach it.

        From the widest class to the narrowest, each adding what the next does not hold itself.
        """
        hazard, weight = self._prior(kind.max_tokens), np.float64(PRIOR_WEIGHT)
        seen = [self._seen[key] for key in kind.lineage if key in self._seen]
        for index, counts in enumerate(seen):
            own = counts - seen[index + 1] if index + 1 < len(seen) else counts
            left = own[_STOPPED] + own[_CENSORED]
            at_risk = np.cumsum(own[_ENTERED]) - np.cumsum(left) + left - own[_CENSORED] / 2
            hazard = (own[_STOPPED] + weight * hazard) / (at_risk + weight)
            weight = np.minimum(weight + at_risk, BACKOFF_WEIGHT)
        return hazard

    def _prior(self, max_tokens: int) -> Array:
        """The hazard before anything is seen; of 2 to the power of ``max_tokens``."""
        hazard = self._priors.get(max_tokens)
        if hazard is None:
            starts, widths = self.edges[:-1], np.diff(self.edges)
            passed = np.maximum(0.0, 1.0 - widths / np.maximum(2.0**max_tokens - starts, 1.0))
            hazard = self._priors[max_tokens] = 1.0 - passed**PRIOR_SHAPE
        return hazard

    def _count(self, lengths: Sequence[int]) -> npt.NDArray[np.int64]:
        """How many are in each bucket."""
        return np.bincount(self._buckets(lengths), minlength=len(self._grid) - 1)

    def _buckets(self, lengths: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.minimum(np.searchsorted(self._grid, lengths, side="right"), len(self._grid) - 1) - 1

    def _no_counts(self) -> Array:
        return np.zeros((3, len(self._grid) - 1))
