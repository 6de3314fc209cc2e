"""A Ray cluster that was there before, and stays: `ridgewalk serve` joins it, `serve run` and `serve deploy` use it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from ridgewalk.replica.host import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MODEL = "demo-dense"
BIN = Path(sys.executable).parent
RIDGEWALK_SERVE = [str(BIN / "ridgewalk"), "serve", MODEL, "--num-blocks", "256"]
SERVE_CONFIG = Path(__file__).parents[2] / "deploy" / "serve_config.yaml"
READY_S = 90


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    address: str
    dashboard: str
    environment: dict[str, str]  # what reaches it, the token it asks for included


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster as `ray start` makes it, without Serve. It asks for a token, which is Ray's default."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard = free_port("127.0.0.1"), free_port("127.0.0.1")
    folder = tempfile.mkdtemp(prefix="rw")  # short: Ray puts sockets there
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=8", "--disable-usage-stats",
        f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
    ]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"RAY_AUTH_MODE": "token"},
    ) as process:
        printed_until(process, "Ray runtime started")
        yield Cluster(environment["RAY_ADDRESS"], f"http://127.0.0.1:{dashboard}", environment)
        for child in psutil.Process(process.pid).children(recursive=True):  # asked to end, it would drain for 30 s
            child.kill()
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Start]:
    """Function that starts a command with the cluster's environment."""
    running: list[subprocess.Popen[str]] = []

    def run(*command: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=cluster.environment | environment,
        )
        running.append(process)
        return process

    yield run
    for process in running:  # not asked to end: Serve takes its time over that, and the cluster goes with all in it
        process.kill()
        process.communicate()


def printed_until(process: subprocess.Popen[str], mark: str) -> str:
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if mark in line:
            return printed
    raise AssertionError(f"{mark!r} was not printed:\n{printed}")


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def ask(port: int) -> str:
    """The model's answer, once the service is there."""
    deadline = time.monotonic() + READY_S
    body = {"model": MODEL, "messages": [{"role": "user", "content": "What is 27 + 58?"}], "temperature": 0}
    while True:
        try:
            reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60, trust_env=False)
            if reply.status_code == 200:
                return reply.json()["choices"][0]["message"]["content"].strip()
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "the service does not answer"
        time.sleep(0.2)


def test_a_service_joins_keeps_to_itself_and_leaves(start: Start) -> None:
    port, other_port = free_port("127.0.0.1"), free_port("127.0.0.1")
    first = start(*RIDGEWALK_SERVE, "--host", "127.0.0.1", "--port", str(port))
    printed = printed_until(first, "Ctrl-C")
    assert "ready after" in printed
    assert "256 KV blocks" in printed  # the replica's own log line
    assert answers(port)

    # Another service finds / taken, says so, and leaves the first alone.
    second = start(*RIDGEWALK_SERVE, "--host", "127.0.0.1", "--port", str(other_port), "--app-name", "another")
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2, output
    assert "'ridgewalk' serves / on this cluster already" in output
    assert "Traceback" not in output
    assert answers(port)

    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert "Traceback" not in output
    assert not answers(port)

    # Serve itself stays, on its first port: the next service takes that one, and says so.
    third = start(*RIDGEWALK_SERVE, "--host", "127.0.0.1", "--port", str(other_port))
    printed = printed_until(third, "Ctrl-C")
    assert f"listens on 127.0.0.1:{port}" in printed
    assert f"http://127.0.0.1:{port}/v1" in printed
    assert "256 KV blocks" in printed
    assert answers(port)


def test_serve_deploy_and_serve_run(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    config = yaml.safe_load(SERVE_CONFIG.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    token = {"RAY_AUTH_MODE": "token"}
    deploy = start(str(BIN / "serve"), "deploy", str(path), "--address", cluster.dashboard, **token)
    output, _ = deploy.communicate(timeout=60)
    assert deploy.returncode == 0, output
    assert ask(port) == "85"

    path.write_text(yaml.safe_dump({**config, "applications": []}))
    removal = start(str(BIN / "serve"), "deploy", str(path), "--address", cluster.dashboard, **token)
    output, _ = removal.communicate(timeout=60)
    assert removal.returncode == 0, output
    run = start(
        str(BIN / "serve"), "run", "ridgewalk.app:build", f"model={MODEL}", "tensor_parallel_size=2", "num_blocks=256",
        "--name", "another", **token,
    )  # fmt: skip
    printed_until(run, "Application 'another' is ready")
    assert ask(port) == "85"
