"""A Prometheus of the service's own: starts when it is ready, ends with it, and keeps nothing."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import yaml
from rich.console import Console
from rich.markup import escape

from ridgewalk.config import ConfigError
from ridgewalk.replica.host import free_port

ADDRESS = "127.0.0.1"
SCRAPE_EVERY = "2s"  # and as long may one take: replicas that fill every core answer late
READY_TIMEOUT_S = 30.0
RULES = Path(__file__).parent / "rules"
"""What ``monitoring/prometheus`` links to: images and wheels hold the package alone."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def find_prometheus() -> str:
    """The program on PATH.

    Raises:
        ConfigError: there is none.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise ConfigError(
            "--with-prometheus: there is no program `prometheus` on PATH; install one with "
            "`apt-get install prometheus` (Debian, Ubuntu) or `brew install prometheus` (macOS), or unpack a release "
            "from the download page of the Prometheus project and add its folder to PATH"
        )
    return program


def rule_files(folder: Path = RULES) -> list[Path]:
    """The recording and alerting rules that can be read, as absolute paths; none in an incomplete installation."""
    return sorted(path.resolve() for path in folder.glob("*.rules.yml") if path.is_file())


def configuration(target: str, rules: list[Path]) -> str:
    """The YAML of a Prometheus that scrapes ``target``, the service's URL, and evaluates ``rules``.

    ``/metrics`` needs no API key, so neither does the scrape.
    """
    url = urlsplit(target)
    return yaml.safe_dump(
        {
            "global": {
                "scrape_interval": SCRAPE_EVERY,
                "scrape_timeout": SCRAPE_EVERY,
                "evaluation_interval": SCRAPE_EVERY,
            },
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [
                {"job_name": "ridgewalk", "scheme": url.scheme, "static_configs": [{"targets": [url.netloc]}]}
            ],
        },
        sort_keys=False,
    )


@contextmanager
def running_prometheus(program: str, target: str, console: Console, rules: Path = RULES) -> Iterator[str | None]:
    """Prometheus, ready and scraping ``target``, for as long as the block runs; gives its URL.

    A service is worth more than being watched: when Prometheus does not start, or ends before the block does, that is
    one warning and the block goes on, in the first case with None.
    """
    found = rule_files(rules)
    if not found:
        console.print(f"[yellow]warning:[/] Prometheus runs without rules: there are none in {rules}", highlight=False)
    with tempfile.TemporaryDirectory(prefix="ridgewalk-prometheus-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "prometheus.yml").write_text(configuration(target, found))
        url = f"http://{ADDRESS}:{free_port(ADDRESS)}"
        process = _start(program, folder, url)
        ending = threading.Event()
        try:
            ready = _wait_ready(process, url)
            if ready:
                threading.Thread(target=_watch, args=(process, folder, ending, console), daemon=True).start()
            else:
                _warn("did not start", folder, console)
            yield url if ready else None
        finally:
            ending.set()
            process.kill()  # what it holds is thrown away: nothing to end in order, and the service needs the time
            process.wait()


def _start(program: str, folder: Path, url: str) -> subprocess.Popen[bytes]:
    def detach() -> None:
        # A terminal's Ctrl-C is ours to pass on: a process group of its own is enough for that. A session of its own
        # would be scheduled against the whole service as one group (autogroup), and starve for seconds when it is busy.
        os.setpgrp()
        if sys.platform == "linux":
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={url.removeprefix('http://')}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=detach,
        )


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(trust_env=False, timeout=5) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if client.get(f"{url}/-/ready").status_code == 200:
                    return process.poll() is None  # else another program has taken the port
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
    return False


def _watch(process: subprocess.Popen[bytes], folder: Path, ending: threading.Event, console: Console) -> None:
    process.wait()
    if not ending.is_set():
        _warn("ended early", folder, console)


def _warn(what: str, folder: Path, console: Console) -> None:
    lines = (folder / "log").read_text(errors="replace").split("\n") if (folder / "log").is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    console.print(
        f"[yellow]warning:[/] Prometheus {what}; the service goes on without it. Its last words: {escape(last)}",
        highlight=False,
    )
