"""Drives a service over the capacity cliff on purpose, and says which alerts fired when.

``python -m tests.benchmarks.drive_over_cliff [--picture docs/kv.svg]`` serves demo-dense with little KV and a
Prometheus beside it, sends ever more clients who want long answers, and prints when each alert became pending and
firing. It fails unless all of `ORDER` fired, the warning of the cliff first and its bottom last.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import httpx

from monitoring.grafana.kv import KV
from monitoring.grafana.picture import Window, draw
from ridgewalk.replica.host import free_port
from tests.monitoring.live_service import LiveService, live_service, load

MODEL = "demo-dense"
STAGES = ((2, 40.0), (12, 90.0), (48, 150.0))  # clients, seconds
MAX_TOKENS = 900
ORDER = ("CapacityTrapApproaching", "RecomputeTax", "PreemptionStorm", "CapacityTrap")
PICTURED = (
    "KV cache used", "Running and waiting", "Throttled for want of KV", "Preemptions", "Recompute tax", "Stranded KV",
)  # fmt: skip


def configuration(num_blocks: int) -> dict[str, object]:
    """Two replicas with KV for a few long answers each."""
    placement = {"replicas": 2, "num_blocks": num_blocks}
    model = {"model": MODEL, "max_model_len": 1024, "max_num_seqs": 64, "placements": [placement],
             "admission": "prompt_only"}  # fmt: skip
    return {"host": "127.0.0.1", "port": free_port("127.0.0.1"), "models": [model]}


def watch(service: LiveService, started: float, seconds: float, seen: dict[tuple[str, str], float]) -> None:
    """Print alerts as they change state."""
    until = time.monotonic() + seconds
    with httpx.Client(trust_env=False, timeout=10) as client:
        while time.monotonic() < until:
            reply = client.get(f"{service.prometheus}/api/v1/alerts").json()
            for alert in reply["data"]["alerts"]:
                key = alert["labels"]["alertname"], alert["state"]
                if key not in seen:
                    seen[key] = time.monotonic() - started
                    print(f"{seen[key]:6.0f} s  {key[1]:8s} {key[0]}: {alert['annotations']['summary']}", flush=True)
            time.sleep(1.0)


def check_order(seen: dict[tuple[str, str], float]) -> str | None:
    """What is wrong with what fired, in a sentence, or None."""
    fired = {name: seconds for (name, state), seconds in seen.items() if state == "firing" and name in ORDER}
    if missing := [name for name in ORDER if name not in fired]:
        return f"did not fire: {', '.join(missing)}"
    if min(fired, key=fired.__getitem__) != ORDER[0] or max(fired, key=fired.__getitem__) != ORDER[-1]:
        return f"fired in another order: {', '.join(sorted(fired, key=fired.__getitem__))}"
    return None


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-blocks", type=int, default=256, help="of each replica")
    parser.add_argument("--picture", help="an .svg or .png file")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        live_service(Path(folder), configuration(arguments.num_blocks)) as service,
    ):
        started, wall, seen = time.monotonic(), time.time(), {}
        for clients, seconds in STAGES:
            print(f"{time.monotonic() - started:6.0f} s  {clients} clients", flush=True)
            with load(service.url, {MODEL: clients}, MAX_TOKENS):
                watch(service, started, seconds, seen)
        if arguments.picture:
            panels = [panel for row in KV.rows for panel in row.panels if panel.title in PICTURED]
            figure = draw(
                "Over the capacity cliff: 2, 12, then 48 clients", panels, service.prometheus, Window(wall, time.time())
            )
            figure.savefig(arguments.picture)
    if problem := check_order(seen):
        raise SystemExit(problem)


if __name__ == "__main__":
    main()
