"""Writes the rules as the Prometheus operator's PrometheusRule: ``python -m monitoring.prometheus_rule``."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
RULES = sorted((ROOT / "monitoring" / "prometheus").glob("*.rules.yml"))
MANIFEST = ROOT / "k8s" / "components" / "prometheus-rules" / "prometheusrule.yaml"


def manifest_text() -> str:
    """The manifest, with the groups of all rule files."""
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "ridgewalk", "labels": {"app.kubernetes.io/part-of": "ridgewalk"}},
        "spec": {"groups": [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]},
    }
    return "# Written by `make dashboards` from monitoring/prometheus.\n" + yaml.safe_dump(
        rule, sort_keys=False, width=120
    )


def main() -> None:
    """Write it."""
    MANIFEST.write_text(manifest_text())
    print(MANIFEST)


if __name__ == "__main__":
    main()
