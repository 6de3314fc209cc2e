"""Reads a service's `/metrics` into numbers that a program can add and subtract."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Sample = tuple[str, frozenset[tuple[str, str]]]

COUNTER_SUFFIXES = ("_total", "_count", "_sum", "_bucket")
"""End the names of series that only fall when the process that counts them has started anew."""


@dataclass(frozen=True)
class Scrape:
    """Every sample of one scrape."""

    samples: Mapping[Sample, float]

    @classmethod
    def parse(cls, text: str) -> Scrape:
        """Read the Prometheus text format."""
        return cls(
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        )

    def total(self, name: str, **labels: str) -> float:
        """Sum of a series over every label not named; 0 when there is none."""
        wanted = set(labels.items())
        return sum(value for (key, found), value in self.samples.items() if key == name and wanted <= found)

    def get(self, name: str, **labels: str) -> float | None:
        """The largest value of a series over every label not named; None when there is none."""
        wanted = set(labels.items())
        return max(
            (value for (key, found), value in self.samples.items() if key == name and wanted <= found), default=None
        )

    def labels_of(self, name: str, **labels: str) -> list[dict[str, str]]:
        """The labels of each series of this name that has those named."""
        wanted = set(labels.items())
        return [dict(found) for key, found in self.samples if key == name and wanted <= found]

    def values_of(self, name: str, label: str, **labels: str) -> set[str]:
        """The values that a label has in the series of this name."""
        return {found[label] for found in self.labels_of(name, **labels) if label in found}

    def since(self, before: Scrape) -> Scrape:
        """What the counters (and histograms) have grown by; gauges lose their meaning."""
        *_, grown = growth([before, self])
        return grown

    def mean(self, name: str, **labels: str) -> float | None:
        """Mean of a histogram or summary; None when nothing was observed."""
        count = self.total(f"{name}_count", **labels)
        return self.total(f"{name}_sum", **labels) / count if count else None


def growth(scrapes: Iterable[Scrape]) -> Iterator[Scrape]:
    """What the counters (and histograms) have grown by since the first scrape, at each of them.

    A counter that fell was started anew, and has grown by its new value since. One that the first scrape lacks began
    at 0. Gauges lose their meaning.
    """
    last: dict[Sample, float] = {}
    grown: dict[Sample, float] = {}
    for number, scrape in enumerate(scrapes):
        for key, value in scrape.samples.items():
            before = value if number == 0 else last.get(key, 0.0)
            anew = value < before and key[0].endswith(COUNTER_SUFFIXES)
            grown[key] = grown.get(key, 0.0) + (value if anew else value - before)
            last[key] = value
        yield Scrape(dict(grown))
