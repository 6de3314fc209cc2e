"""A Prometheus beside a service: a real one, without the service (`tests/monitoring/test_live.py` has both)."""

from __future__ import annotations

import io
import shutil
import threading
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from ridgewalk.cli import app
from ridgewalk.config import ConfigError
from ridgewalk.launch.prometheus import configuration, find_prometheus, rule_files, running_prometheus

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
TARGET = "http://127.0.0.1:9"  # where nothing answers
MONITORING = Path(__file__).parents[2] / "monitoring" / "prometheus"


class Screen(io.StringIO):
    """What was printed, to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()

    def write(self, text: str) -> int:
        with self.changed:
            count = super().write(text)
            self.changed.notify_all()
            return count

    def wait_for(self, text: str) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: text in self.getvalue(), timeout=20)


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def console(screen: Screen) -> Console:
    return Console(file=screen, soft_wrap=True)


def own_prometheus() -> psutil.Process:
    """The one that this process started."""
    (process,) = [child for child in psutil.Process().children() if child.name() == "prometheus"]
    return process


@needs_prometheus
def test_it_listens_on_the_loopback_address_with_our_rules_and_leaves_nothing(console: Console, screen: Screen) -> None:
    with running_prometheus(find_prometheus(), TARGET, console) as url:
        process = own_prometheus()
        (option,) = [part for part in process.cmdline() if part.startswith("--config.file=")]
        folder = Path(option.removeprefix("--config.file=")).parent
        assert folder.is_dir()
        assert {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        groups = httpx.get(f"{url}/api/v1/rules", trust_env=False).json()["data"]["groups"]
    loaded = {rule["name"] for group in groups for rule in group["rules"]}
    files = [yaml.safe_load((MONITORING / name).read_text()) for name in ("recording.rules.yml", "alerts.rules.yml")]
    wanted = [rule for file in files for group in file["groups"] for rule in group["rules"]]
    assert loaded == {rule.get("alert") or rule["record"] for rule in wanted}
    assert not process.is_running()
    assert not folder.exists()
    assert screen.getvalue() == ""


@needs_prometheus
def test_one_that_ends_early_is_one_warning_and_the_service_goes_on(console: Console, screen: Screen) -> None:
    with running_prometheus(find_prometheus(), TARGET, console) as url:
        assert url is not None
        own_prometheus().kill()
        assert screen.wait_for("\n")
    assert screen.getvalue().count("\n") == 1
    assert "warning: Prometheus ended early; the service goes on without it" in screen.getvalue()


def test_one_that_does_not_start_is_one_warning_with_its_reason(
    tmp_path: Path, console: Console, screen: Screen
) -> None:
    program = tmp_path / "prometheus"
    program.write_text("#!/bin/sh\necho first\necho no room on the disk\nexit 1\n")
    program.chmod(0o700)
    with running_prometheus(str(program), TARGET, console) as url:
        assert url is None
    assert screen.getvalue().count("\n") == 1
    assert "did not start" in screen.getvalue()
    assert screen.getvalue().endswith("no room on the disk\n")


def test_without_rule_files_it_says_so(tmp_path: Path, console: Console, screen: Screen) -> None:
    with running_prometheus(shutil.which("true") or "true", TARGET, console, rules=tmp_path):
        pass
    assert "runs without rules" in screen.getvalue()


def test_the_package_ships_the_rules_that_users_read() -> None:
    assert rule_files() == sorted(path.resolve() for path in MONITORING.glob("*.rules.yml"))
    assert len(rule_files()) == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://[::1]:8000", "http://192.0.2.1:80"])
def test_the_target_is_the_address_of_the_service(url: str) -> None:
    written = yaml.safe_load(configuration(url, []))
    assert written["scrape_configs"][0]["static_configs"] == [{"targets": [url.removeprefix("http://")]}]


@pytest.mark.parametrize("arguments", [["serve", "demo-dense", "--with-prometheus"], ["watch"]])
def test_where_none_is_installed_nothing_starts_and_the_remedy_is_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "--with-prometheus" in str(result.exception)
    assert "apt-get install prometheus" in str(result.exception)
    assert result.stdout == ""
