"""`ridgewalk serve` on a Ray cluster that was there before, and stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import pytest

from ridgewalk.replica.host import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MODEL = "demo-dense"
CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=8, include_dashboard=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
SERVE = [sys.executable, "-c", "from ridgewalk.cli import main; main()", "serve", MODEL, "--num-blocks", "256"]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster without Serve. It ends with its standard input."""
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


@pytest.fixture
def start(cluster: str) -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*SERVE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"RAY_ADDRESS": cluster},
        )
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(30)


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


def test_a_service_joins_keeps_to_itself_and_leaves(start: Start) -> None:
    port, other_port = free_port("127.0.0.1"), free_port("127.0.0.1")
    first = start("--host", "127.0.0.1", "--port", str(port))
    printed = printed_until(first, "Ctrl-C")
    assert "ready after" in printed
    assert "256 KV blocks" in printed  # the replica's own log line
    assert answers(port)

    # Another service finds / taken, says so, and leaves the first alone.
    for arguments in ([], ["--app-name", "another"]):
        second = start("--host", "127.0.0.1", "--port", str(other_port), *arguments)
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 2, output
        assert "'ridgewalk' serves / on this cluster already" in output
        assert "Traceback" not in output
    assert answers(port)

    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=30)
    assert first.returncode == 0, output
    assert "Traceback" not in output
    assert not answers(port)

    # Serve itself stays, on its first port: the next service takes that one, and says so.
    third = start("--host", "127.0.0.1", "--port", str(other_port))
    printed = printed_until(third, "Ctrl-C")
    assert f"listens on 127.0.0.1:{port}" in printed
    assert f"http://127.0.0.1:{port}/v1" in printed
    assert "256 KV blocks" in printed
    assert answers(port)


def test_a_cluster_that_is_not_there_is_one_sentence() -> None:
    done = subprocess.run(
        SERVE,
        env=os.environ | {"RAY_ADDRESS": f"127.0.0.1:{free_port('127.0.0.1')}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "no Ray cluster answers" in done.stderr
    assert "Traceback" not in done.stderr
