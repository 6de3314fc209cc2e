"""How many tokens sequences have yet to write, by what this ingress has seen end and what it has open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ridgewalk.engine.length_class import LengthClass
from ridgewalk.engine.output_lengths import Array, OutputLengths
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence

EASE = 0.75
"""The exponent by which a long output excuses a long latency, see `kv_growth`: 0, not at all; 1, in proportion."""


@dataclass(frozen=True)
class Remaining:
    """Output tokens to come: the mean, and the mean of their power of 2 - `EASE`, which weighs the long ones more."""

    mean: float
    power: float


class LengthForecast:
    """Moments of the survival curves of `OutputLengths`, kept until the next `refresh`."""

    def __init__(self, max_model_len: int) -> None:
        self._lengths = OutputLengths(max_model_len)
        self._areas: dict[LengthClass, Array] = {}  # under the curve, from each edge on
        self.num_seen = 0  # sequences that ended

    def observe(self, sequence: OpenSequence, stopped: bool) -> None:
        """A sequence ended, at its own wish or (not ``stopped``) cut short."""
        new = sequence.new
        if new.may_stop and sequence.num_output_tokens > new.num_resumed_tokens:
            self._lengths.observe_length(new.kind, new.num_resumed_tokens, sequence.num_output_tokens, stopped)
            self.num_seen += 1

    def refresh(self, running: Iterable[OpenSequence]) -> None:
        """Estimate anew, with what runs now: it says how long outputs are at least."""
        self._lengths.refresh_with(
            (each.new.kind, each.new.num_resumed_tokens, each.num_output_tokens)
            for each in running
            if each.new.may_stop
        )
        self._areas = {}

    def of_new(self, new: NewSequence) -> Remaining:
        """Of a sequence about to be sent."""
        have, limit = float(new.num_resumed_tokens), float(new.max_tokens)
        if not new.may_stop:
            return Remaining(limit - have, (limit - have) ** (2 - EASE))
        edges, curve = self._lengths.edges, self._lengths.curve(new.kind)
        points = np.concatenate(([have], edges[(edges > have) & (edges < limit)], [limit]))
        alive = np.interp(points, edges, curve)
        alive /= max(alive[0], 1e-12)
        # E[X] and E[X^a] of a positive X are the integrals of P(X > x) and of a x^(a - 1) P(X > x).
        return Remaining(
            _integral(points, alive), _integral(points, (2 - EASE) * (points - have) ** (1 - EASE) * alive)
        )

    def of_open(self, sequences: Sequence[OpenSequence]) -> Array:
        """Mean of each that is on its way."""
        remaining = np.zeros(len(sequences))
        by_class: dict[LengthClass, list[int]] = {}
        for index, each in enumerate(sequences):
            if each.new.may_stop:
                by_class.setdefault(each.new.kind, []).append(index)
            else:
                remaining[index] = each.new.max_tokens - each.num_output_tokens
        for kind, rows in by_class.items():
            have = np.array([float(sequences[row].num_output_tokens) for row in rows])
            limit = np.array([float(sequences[row].new.max_tokens) for row in rows])
            edges, curve = self._lengths.edges, self._lengths.curve(kind)
            area = self._area(kind)
            between = np.interp(have, edges, area) - np.interp(limit, edges, area)
            remaining[rows] = between / np.maximum(np.interp(have, edges, curve), 1e-12)
        return np.maximum(remaining, 1.0)  # none of them has ended

    def _area(self, kind: LengthClass) -> Array:
        if kind not in self._areas:
            edges, curve = self._lengths.edges, self._lengths.curve(kind)
            pieces = np.diff(edges) * (curve[1:] + curve[:-1]) / 2
            self._areas[kind] = np.concatenate((np.cumsum(pieces[::-1])[::-1], [0.0]))
        return self._areas[kind]


def _integral(points: Array, values: Array) -> float:
    return float(np.sum(np.diff(points) * (values[1:] + values[:-1])) / 2)
