"""`ridgewalk bench` with the real aiperf against the real service."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ridgewalk.bench.report import read_report
from ridgewalk.cli import app

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_load_is_sent_measured_on_both_sides_and_reported(service_url: str, tmp_path: Path) -> None:
    arguments = [
        "bench",
        "--url",
        service_url,
        "--profile",
        "chat",
        "--scale",
        "0.1",
        "--requests",
        "8",
        "--concurrency",
    ]
    arguments += ["4", "--slo-e2e", "60s", "--seed", "3", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (point,) = read_report(tmp_path / "report.json").points
    assert (point.client.num_requests, point.client.num_failed, point.client.num_wrong_length) == (8, 0, 0)
    assert point.client.good_share == 1.0
    assert point.service is not None
    assert point.service.generation_tokens == sum(point.client.requests.output_tokens)  # both sides, one window
    assert point.service.collective_share is not None
    assert point.service.collective_share > 0
    assert [replica.name for replica in point.service.replicas] == ["TP2/0"]
    assert "<svg" in (tmp_path / "report.html").read_text()
