"""Alertmanager: amtool takes the example, alerts reach who they should, and it names only alerts that exist."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml

from tests.monitoring.queries import MONITORING, rules

CONFIG = MONITORING / "alertmanager" / "alertmanager.yml"

needs_amtool = pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed")


def amtool(*arguments: str) -> str:
    done = subprocess.run(["amtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_amtool
def test_amtool_takes_the_configuration() -> None:
    assert "2 receivers" in amtool("check-config", str(CONFIG))


@needs_amtool
@pytest.mark.parametrize(("severity", "receiver"), [("critical", "on-call"), ("warning", "team"), ("unknown", "team")])
def test_severity_decides_who_hears(severity: str, receiver: str) -> None:
    routed = amtool("config", "routes", "test", f"--config.file={CONFIG}", f"severity={severity}", "model_name=x")
    assert routed.strip() == receiver


def test_inhibitions_name_alerts_and_labels_that_exist() -> None:
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    for rule in yaml.safe_load(CONFIG.read_text())["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            label, names = re.fullmatch(r'(\w+) (?:=|!=|=~) "([^"]*)"', matcher).groups()  # type: ignore[union-attr]
            assert label in ("alertname", "model_name")
            if label == "alertname":
                assert set(names.split("|")) <= alerts
        assert set(rule.get("equal", [])) <= {"job", "namespace", "model_name", "placement", "replica"}


def test_prometheus_sends_its_alerts_there() -> None:
    config = yaml.safe_load((MONITORING / "prometheus" / "prometheus.yml").read_text())
    (manager,) = config["alerting"]["alertmanagers"]
    assert manager["static_configs"] == [{"targets": ["localhost:9093"]}]
