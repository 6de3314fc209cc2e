"""`ridgewalk serve` as a user runs it: a process that gets ready, answers, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from ridgewalk.load.scrape import Scrape
from ridgewalk.replica.host import free_port
from tests.launch.addresses import can_listen, own_address
from tests.monitoring.live_service import RIDGEWALK
from tests.service.conftest import MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]
COMMAND = [*RIDGEWALK, "serve"]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def wait_ready(process: subprocess.Popen[str]) -> str:
    """Everything printed up to the line that tells how to use the service."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if "Ctrl-C" in line:
            return printed
    raise AssertionError(f"the service ended before it was ready:\n{printed}")


def ask(url: str) -> str:
    body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": "What is 27 + 58?"}]}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    return reply.json()["choices"][0]["message"]["content"].strip()


def test_two_services_live_on_one_machine_and_leave_nothing_behind(start: Start, tmp_path: Path) -> None:
    ports = [free_port("127.0.0.1") for _ in range(2)]
    hybrid = tmp_path / "hybrid.yaml"
    placements = [{"num_blocks": 256}, {"tensor_parallel_size": 2, "num_blocks": 256}]
    hybrid.write_text(yaml.safe_dump({"models": [{"model": MODEL, "placements": placements}]}))
    hosts = [own_address() or "127.0.0.1", "::" if can_listen("::") else "0.0.0.0"]
    urls = [f"http://{host}:{port}" for host, port in zip([hosts[0], "127.0.0.1"], ports, strict=True)]
    services = [
        start(*arguments, "--host", host, "--port", str(port))
        for arguments, host, port in zip(
            ([MODEL, "--num-blocks", "512"], ["-c", str(hybrid)]), hosts, ports, strict=True
        )
    ]
    with ThreadPoolExecutor(1) as watcher:
        starting = watcher.submit(statuses_until_ready, urls[0])
        for process, url in zip(services, urls, strict=True):
            printed = wait_ready(process)
            assert "curl" in printed
            assert "\x1b" not in printed  # colours are for terminals
            with ThreadPoolExecutor(12) as pool:
                assert set(pool.map(ask, [url] * 12)) == {"85"}
        assert starting.result() <= {None, 503, 200}
    if hosts[1] == "::":
        assert ask(f"http://[::1]:{ports[1]}") == "85"
    assert used_placements(urls[0]) == {"TP1": 1}
    assert used_placements(urls[1]) == {"TP1": 1, "TP2": 1}
    with ThreadPoolExecutor(2) as stoppers:
        assert list(stoppers.map(stop_in_mid_stream, services, urls)) == [0, 0]


def stop_in_mid_stream(process: subprocess.Popen[str], url: str) -> int:
    """Ctrl-C while an answer is on its way: it is ended with an error event, and nothing stays behind."""
    family = psutil.Process(process.pid).children(recursive=True)
    haproxy = next(child for child in family if "haproxy" in child.name())
    folder = Path(haproxy.cmdline()[haproxy.cmdline().index("-f") + 1]).parents[1]
    assert folder.is_dir()
    with open_stream(url) as lines:
        next(lines)
        process.send_signal(signal.SIGINT)
        events = [line for line in lines if line.startswith("data: ")]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    status = process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=0)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    assert not folder.exists()
    return status


@contextmanager
def open_stream(url: str) -> Iterator[Iterator[str]]:
    """Lines of an answer that takes longer than a service drains."""
    fields = {"prompt": "1", "stream": True, "n": 32, "max_tokens": 1900, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json={"model": MODEL, **fields}, timeout=60) as reply:
        yield reply.iter_lines()


def statuses_until_ready(url: str) -> set[int | None]:
    """What ``/health`` answered until 200; None: it was refused."""
    seen: set[int | None] = set()
    with httpx.Client(trust_env=False, timeout=5) as client:
        while 200 not in seen:
            try:
                seen.add(client.get(f"{url}/health").status_code)
            except httpx.TransportError:
                seen.add(None)
            time.sleep(0.02)
    return seen


def used_placements(url: str) -> dict[str, int]:
    """Replicas that computed tokens, by placement; every replica that shall run answered the scrape."""
    scrape = Scrape.parse(httpx.get(f"{url}/metrics", timeout=10).text)
    assert scrape.total("ridgewalk_scrape_missing_replicas") == 0
    placements = [
        dict(labels)["placement"]
        for (name, labels), value in scrape.samples.items()
        if name == "ridgewalk_generation_tokens_total" and value > 0
    ]
    return dict(Counter(placements))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_service_that_is_stopped_while_it_starts_leaves_nothing_behind(start: Start, number: signal.Signals) -> None:
    process = start(MODEL, "--host", "127.0.0.1", "--port", str(free_port("127.0.0.1")))
    assert process.stdout is not None
    for line in process.stdout:
        if "starting Ray" in line:
            break
    parent = psutil.Process(process.pid)
    while not (family := parent.children(recursive=True)):
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == 0
    assert process.stdout.read().endswith("stopped\n")
    _, alive = psutil.wait_procs(family, timeout=0)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
