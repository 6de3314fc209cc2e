"""Metric families that are cheap to record into. `prometheus_client`'s own take a lock and walk all buckets per
observation; these take one lock per batch and find the bucket by bisection."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.utils import floatToGoString

from ridgewalk.metrics.catalogue import MetricSpec

Labels = tuple[str, ...]
"""Values of the labels of a `MetricSpec` that follow the recorder's constant ones, in its order."""


class CounterFamily:
    """Totals by label values. Recorded by any thread, collected by any other."""

    def __init__(self, spec: MetricSpec, constant: Labels) -> None:
        self._spec, self._constant = spec, constant
        self._values: defaultdict[Labels, float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, labels: Labels = (), amount: float = 1) -> None:
        """Count; an amount of 0 makes the series appear."""
        with self._lock:
            self._values[labels] += amount

    def collect(self) -> Metric:
        """The family now."""
        with self._lock:
            values = list(self._values.items())
        return counters(self._spec, [((*self._constant, *labels), value) for labels, value in values])


class _Histogram:
    __slots__ = ("counts", "total")

    def __init__(self, num_bounds: int) -> None:
        self.counts = [0] * (num_bounds + 1)  # not cumulative; the last one is beyond every bound
        self.total = 0.0


class HistogramFamily:
    """Histograms by label values. Recorded by any thread, collected by any other."""

    def __init__(self, spec: MetricSpec, constant: Labels) -> None:
        self._spec, self._constant = spec, constant
        self._histograms: dict[Labels, _Histogram] = {}
        self._bounds = spec.buckets
        self._bound_names = [*map(floatToGoString, spec.buckets), "+Inf"]
        self._lock = threading.Lock()

    def observe(self, labels: Labels, value: float, times: int = 1) -> None:
        """Record ``times`` observations of ``value``; 0 makes the series appear."""
        with self._lock:
            histogram = self._get(labels)
            histogram.counts[bisect_left(self._bounds, value)] += times
            histogram.total += value * times

    def observe_all(self, values: Iterable[tuple[Labels, list[float]]]) -> None:
        """Record many observations at once."""
        bounds = self._bounds
        with self._lock:
            for labels, observed in values:
                histogram = self._get(labels)
                counts = histogram.counts
                for value in observed:
                    counts[bisect_left(bounds, value)] += 1
                histogram.total += sum(observed)

    def collect(self) -> Metric:
        """The family now."""
        with self._lock:
            state = [(labels, list(each.counts), each.total) for labels, each in self._histograms.items()]
        family = HistogramMetricFamily(self._spec.name, self._spec.help, labels=self._spec.labels)
        for labels, counts, total in state:
            buckets = list(zip(self._bound_names, accumulate(counts), strict=True))
            family.add_metric((*self._constant, *labels), buckets, total)
        return family

    def _get(self, labels: Labels) -> _Histogram:
        histogram = self._histograms.get(labels)
        if histogram is None:
            histogram = self._histograms[labels] = _Histogram(len(self._bounds))
        return histogram


class SummaryFamily:
    """Sums and counts by label values, without quantiles. Recorded by any thread, collected by any other."""

    def __init__(self, spec: MetricSpec, constant: Labels) -> None:
        self._spec, self._constant = spec, constant
        self._values: dict[Labels, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def observe_all(self, values: Iterable[tuple[Labels, float]]) -> None:
        """Record one observation of each pair."""
        with self._lock:
            for labels, value in values:
                count, total = self._values.get(labels, (0, 0.0))
                self._values[labels] = (count + 1, total + value)

    def collect(self) -> Metric:
        """The family now."""
        with self._lock:
            state = list(self._values.items())
        family = SummaryMetricFamily(self._spec.name, self._spec.help, labels=self._spec.labels)
        for labels, (count, total) in state:
            family.add_metric((*self._constant, *labels), count, total)
        return family


def gauges(spec: MetricSpec, values: Iterable[tuple[Labels, float]]) -> Metric:
    """A gauge family from values known elsewhere; here the label values are all of the spec's."""
    family = GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def counters(spec: MetricSpec, values: Iterable[tuple[Labels, float]]) -> Metric:
    """A counter family from totals known elsewhere; here the label values are all of the spec's."""
    family = CounterMetricFamily(spec.name, spec.help, labels=spec.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family
