"""`ridgewalk serve --with-prometheus` in a process of its own, a load for it, and what its Prometheus says."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import yaml

from ridgewalk.load.streaming_client import RequestFailed, stream_completion
from ridgewalk.replica.host import free_port

RIDGEWALK = [sys.executable, "-c", "from ridgewalk.cli import main; main()"]
MAX_MODEL_LEN = 256
PEAKS = {"peak_flops_per_rank": 200e9, "peak_bandwidth_per_rank": "20GB"}
"""Of about one core."""


def configuration(models: Mapping[str, list[dict[str, Any]]], num_blocks: int) -> dict[str, Any]:
    """A service of these placements, with so little KV that requests wait for it. Of the first model they are preempted
    too; the others predict what they will need. What is evicted of the preempted is swapped out.
    """
    return {
        "host": "127.0.0.1",
        "port": free_port("127.0.0.1"),
        "models": [
            {
                "model": model,
                "max_model_len": MAX_MODEL_LEN,
                "max_num_seqs": 16,
                "swap_space": "1MiB",
                "admission": "predictive" if index else "prompt_only",
                "placements": [{**placement, **PEAKS, "num_blocks": num_blocks} for placement in placements],
            }
            for index, (model, placements) in enumerate(models.items())
        ],
    }


@dataclass
class LiveService:
    """A running service and its Prometheus."""

    process: subprocess.Popen[str]
    url: str
    prometheus: str
    printed: list[str] = field(default_factory=list)

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query; NaN, which is what 0 / 0 gives, is none."""
        reply = httpx.post(f"{self.prometheus}/api/v1/query", data={"query": expr}, trust_env=False, timeout=10).json()
        assert reply["status"] == "success", (expr, reply)
        result = reply["data"]["result"]
        samples = [{"metric": {}, "value": result}] if reply["data"]["resultType"] == "scalar" else result
        return [sample for sample in samples if sample["value"][1] != "NaN"]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule that Prometheus has loaded, and how it fares."""
        groups = httpx.get(f"{self.prometheus}/api/v1/rules", trust_env=False, timeout=10).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def processes(self) -> list[psutil.Process]:
        """All that belong to it."""
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]


@contextmanager
def live_service(folder: Path, config: Mapping[str, Any]) -> Iterator[LiveService]:
    """Started, ready, and ended at the latest with the block."""
    path = folder / "service.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    process = subprocess.Popen(
        [*RIDGEWALK, "serve", "--with-prometheus", "-c", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if found := re.search(r"Prometheus, until then, at (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            raise AssertionError("the service ended before it was ready:\n" + "".join(printed))
        service = LiveService(process, f"http://127.0.0.1:{config['port']}", found[1], printed)
        threading.Thread(target=printed.extend, args=(process.stdout,), daemon=True).start()  # lest the pipe fill
        yield service
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@contextmanager
def load(url: str, clients: Mapping[str, int], max_tokens: int) -> Iterator[None]:
    """So many clients of each model ask all the time, and one asks for what is not there, until the block ends."""
    loop = asyncio.new_event_loop()

    async def client(session: aiohttp.ClientSession, model: str, number: int) -> None:
        body = {"model": model, "prompt": f"What is {number} + 58?", "max_tokens": max_tokens, "ignore_eos": True}
        while True:
            await stream_completion(session, f"{url}/v1/completions", body)

    async def lost_client(session: aiohttp.ClientSession) -> None:
        while True:
            try:
                await stream_completion(session, f"{url}/v1/completions", {"model": "none", "prompt": "1"})
            except RequestFailed:
                await asyncio.sleep(1.0)

    async def run() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            work = [client(session, model, number) for model, count in clients.items() for number in range(count)]
            await asyncio.gather(lost_client(session), *work)

    task = loop.create_task(run())

    def drive() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(asyncio.wait([task]))

    thread = threading.Thread(target=drive)
    thread.start()
    try:
        yield
    finally:
        if task.done():
            task.result()  # a client failed: its error is the test's
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Ask another process again and again until it says so."""
    waiting = threading.Event()
    return any(condition() or waiting.wait(0.25) for _ in range(int(timeout_s / 0.25)))
