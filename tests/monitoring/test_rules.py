"""Prometheus rules: promtool takes them, each alert has a case that fires and a quiet one, every metric exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from monitoring.prometheus_rule import MANIFEST, manifest_text
from tests.monitoring.queries import readable, rules

FOLDER = Path(__file__).parents[2] / "monitoring" / "prometheus"
CASES = sorted((FOLDER / "tests").glob("*.test.yml"))
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_takes_the_configuration_and_its_rules() -> None:
    promtool("check", "config", "prometheus.yml")


@needs_promtool
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_rules_give_what_was_worked_out_by_hand(cases: Path) -> None:
    promtool("test", "rules", str(cases))


def test_every_recording_rule_has_a_case() -> None:
    tested = {
        match
        for path in CASES
        for case in yaml.safe_load(path.read_text())["tests"]
        for expected in case["promql_expr_test"]
        for match in re.findall(r"ridgewalk:[\w:]+", expected["expr"])
    }
    assert tested == {rule["record"] for rule in rules() if "record" in rule}


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fires: dict[str, set[bool]] = {}
    for case in (case for path in CASES for case in yaml.safe_load(path.read_text())["tests"]):
        for expected in case["promql_expr_test"]:
            name = re.search(r'alertname="(\w+)"', expected["expr"])
            if name is None:
                continue
            fires.setdefault(name[1], set()).add(bool(expected["exp_samples"]))
    assert fires == {rule["alert"]: {True, False} for rule in rules() if "alert" in rule}


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["runbook"]


def test_rules_name_only_what_is_exported_or_recorded() -> None:
    known = readable()
    for rule in rules():
        for name in re.findall(r"\bridgewalk[:_][\w:]+", rule["expr"]):
            assert name in known, f"{rule.get('alert') or rule['record']} reads {name}"


def test_the_operator_gets_the_same_rules() -> None:
    """Else: `make dashboards`."""
    assert MANIFEST.read_text() == manifest_text()
    assert [rule for group in yaml.safe_load(manifest_text())["spec"]["groups"] for rule in group["rules"]] == (
        sorted(rules(), key=lambda rule: "record" in rule)  # alerts.rules.yml comes first
    )
