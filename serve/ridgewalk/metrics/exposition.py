"""One scrape for the whole service: snapshots of all processes in, Prometheus text (version 0.0.4) out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import Metric

from ridgewalk import __version__
from ridgewalk.metrics import catalogue
from ridgewalk.metrics.families import gauges
from ridgewalk.metrics.model_gauges import model_gauges
from ridgewalk.metrics.snapshot import Family, Snapshot, family_of

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ORDER = {spec.name: index for index, spec in enumerate(catalogue.CATALOGUE)}

_Columns = tuple[tuple[str, str], ...]
_Labels = tuple[tuple[str, str], ...]


def merge(
    snapshots: Iterable[Snapshot],
    missing_replicas: Mapping[tuple[str, str], int] | None = None,
    missing_ingresses: int = 0,
) -> bytes:
    """The text of one scrape.

    ``snapshots`` are those of the processes that answered, in any order; ``missing_replicas`` counts by ``(model_name,
    placement)`` the replicas that did not, ``missing_ingresses`` the ingresses. Samples with equal name and labels are
    summed. What depends on all replicas of a model is computed over those that answered.
    """
    snapshots = list(snapshots)
    families: defaultdict[str, list[Family]] = defaultdict(list)
    for snapshot in snapshots:
        for family in snapshot.families:
            families[family.name].append(family)
    for metric in _service_metrics(snapshots, missing_replicas or {}, missing_ingresses):
        family = family_of(metric)
        families[family.name] = [family]
    names = sorted(families, key=lambda name: (_ORDER.get(name, len(_ORDER)), name))
    return "".join(line for name in names for line in _render(families[name])).encode()


def _service_metrics(
    snapshots: list[Snapshot], missing_replicas: Mapping[tuple[str, str], int], missing_ingresses: int
) -> Iterator[Metric]:
    replicas = [snapshot.replica for snapshot in snapshots if snapshot.replica is not None]
    yield from model_gauges(sorted(replicas, key=lambda state: (state.model_name, state.placement, state.replica)))
    missing = {(state.model_name, state.placement): 0 for state in replicas} | dict(missing_replicas)
    yield gauges(catalogue.SCRAPE_MISSING_REPLICAS, sorted(missing.items()))
    yield gauges(catalogue.SCRAPE_MISSING_INGRESSES, [((), missing_ingresses)])
    yield gauges(catalogue.BUILD_INFO, [((__version__,), 1)])


def _render(families: list[Family]) -> Iterator[str]:
    columns, rows = _sum_series(families)
    if not rows:
        return
    name, kind = families[0].name, families[0].kind
    yield f"# HELP {name} {_escape_help(families[0].help)}\n# TYPE {name} {kind}\n"
    heads = [(name + suffix, f'le="{le}"' if le else "") for suffix, le in columns]
    for labels in sorted(rows):
        rendered = ",".join([f'{key}="{_escape(value)}"' for key, value in labels])
        for (full_name, le), value in zip(heads, rows[labels], strict=True):
            inner = f"{rendered},{le}" if rendered and le else rendered or le
            yield f"{full_name}{{{inner}}} {_number(value)}\n" if inner else f"{full_name} {_number(value)}\n"


def _sum_series(families: list[Family]) -> tuple[_Columns, dict[_Labels, list[float]]]:
    """Add up series with equal labels.

    While a service is being upgraded its processes may disagree on buckets: those that all have remain, and as
    buckets are cumulative these are exact.
    """
    with_series = [family for family in families if family.series]
    layouts = {family.columns for family in with_series}
    common = set.intersection(*(set(layout) for layout in layouts)) if layouts else set()
    columns = tuple(column for column in min(layouts, default=()) if column in common)
    found: defaultdict[_Labels, list[list[float]]] = defaultdict(list)
    for family in with_series:
        positions = None if family.columns == columns else [family.columns.index(column) for column in columns]
        for series in family.series:
            values = series.values if positions is None else [series.values[position] for position in positions]
            found[series.labels].append(values)
    # fsum is exact, so that the order of the snapshots leaves no trace
    return columns, {
        labels: rows[0] if len(rows) == 1 else [math.fsum(values) for values in zip(*rows, strict=True)]
        for labels, rows in found.items()
    }


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    if value == (whole := int(value) if math.isfinite(value) else math.nan):
        return str(whole)
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")
