"""PromQL as the dashboards and rules hold it: what it reads, and what it is with every variable filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ridgewalk.metrics.catalogue import CATALOGUE

MONITORING = Path(__file__).parents[2] / "monitoring"
RULE_FILES = ("recording.rules.yml", "alerts.rules.yml")

OF_PROMETHEUS: Mapping[str, set[str]] = {
    "ALERTS": {"alertname", "alertstate", "severity", "model_name", "placement", "replica"},
    "up": {"job", "instance"},
    "scrape_duration_seconds": {"job", "instance"},
    "scrape_samples_scraped": {"job", "instance"},
}
"""Series that Prometheus makes itself, and their labels."""


@dataclass(frozen=True)
class PanelQuery:
    """One query of one panel of a dashboard's JSON."""

    board: str
    panel: str
    expr: str
    legend: str


def rules() -> list[dict[str, Any]]:
    """Every rule of the shipped files."""
    return [
        rule
        for name in RULE_FILES
        for group in yaml.safe_load((MONITORING / "prometheus" / name).read_text())["groups"]
        for rule in group["rules"]
    ]


def readable() -> dict[str, set[str]]:
    """Labels of every series that can be read: exported, recorded or Prometheus' own."""
    known = {name: set(labels) for name, labels in OF_PROMETHEUS.items()}
    for spec in CATALOGUE:
        known[spec.name] = set(spec.labels)
        if spec.kind in ("histogram", "summary"):
            known |= {f"{spec.name}_{part}": set(spec.labels) for part in ("sum", "count")}
        if spec.kind == "histogram":
            known[f"{spec.name}_bucket"] = {*spec.labels, "le"}
    for rule in rules():
        if "record" in rule:
            by = re.search(r"by \(([^)]*)\)", rule["expr"])
            known[rule["record"]] = set(re.findall(r"\w+", by[1])) - {"le"} if by else set()
    return known


def panel_queries(board: Mapping[str, Any]) -> Iterator[PanelQuery]:
    """All queries of a dashboard's JSON."""
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield PanelQuery(board["title"], panel["title"], target["expr"], target.get("legendFormat", ""))


def filled(expr: str, window: str) -> str:
    """A query as Grafana sends it with all models and placements chosen."""
    for variable, value in {"model_name": ".*", "placement": ".*", "__rate_interval": window}.items():
        expr = expr.replace(f"${variable}", value)
    return expr
