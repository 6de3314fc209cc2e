"""The catalogue itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ridgewalk.metrics.catalogue import CATALOGUE, LABELS, MetricSpec
from ridgewalk.routing.decision import RoutingReason


def test_names_are_unique() -> None:
    assert len({spec.name for spec in CATALOGUE}) == len(CATALOGUE) > 30


@pytest.mark.parametrize("spec", CATALOGUE, ids=lambda spec: spec.name)
def test_names_units_labels_and_buckets_agree(spec: MetricSpec) -> None:
    assert spec.name.startswith("ridgewalk_")
    assert spec.name.endswith("_total") == (spec.kind == "counter")
    if spec.unit in ("seconds", "bytes"):
        assert spec.name.removesuffix("_total").endswith(spec.unit)
    assert spec.help.endswith(".")
    assert set(spec.labels) <= set(LABELS)
    assert bool(spec.buckets) == (spec.kind == "histogram")
    assert list(spec.buckets) == sorted(set(spec.buckets))


def test_no_label_is_described_in_vain() -> None:
    assert set(LABELS) == {label for spec in CATALOGUE for label in spec.labels}


def test_every_reason_of_the_router_is_listed() -> None:
    listed = LABELS["reason"].removesuffix(".").split(": ")[1].split(" | ")
    assert set(listed) == {reason.value for reason in RoutingReason}


def test_collectives_are_seen_from_10_us_to_1_s() -> None:
    buckets = next(spec.buckets for spec in CATALOGUE if spec.name == "ridgewalk_collective_seconds")
    assert (buckets[0], buckets[-1]) == (1e-5, 1.0)


def test_the_package_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, ridgewalk.metrics.engine_metrics, ridgewalk.metrics.ingress_metrics, ridgewalk.metrics.exposition;"
        "sys.exit(' '.join({'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
