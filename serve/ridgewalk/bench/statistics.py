"""Small samples as the figures of a report."""

from __future__ import annotations

from collections.abc import Sequence

from ridgewalk.bench.report import Distribution
from ridgewalk.load.percentile import percentile


def distribution(values: Sequence[float]) -> Distribution | None:
    """None without values."""
    if not values:
        return None
    return Distribution(
        mean=rounded(sum(values) / len(values)),
        p50=rounded(percentile(values, 0.5)),
        p90=rounded(percentile(values, 0.9)),
        p99=rounded(percentile(values, 0.99)),
        max=rounded(max(values)),
    )


def mean(values: Sequence[float]) -> float | None:
    """None without values."""
    return sum(values) / len(values) if values else None


def rounded(value: float) -> float:
    """To six significant digits: a report is read and kept, not calculated with."""
    return float(f"{value:.6g}")


def ratio(part: float, whole: float) -> float | None:
    """None when there is no whole."""
    return part / whole if whole else None
