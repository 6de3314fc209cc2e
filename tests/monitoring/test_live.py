"""A real Prometheus beside a real service of two models and four replicas: every panel and every rule has its data."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from ridgewalk.load.scrape import Scrape
from tests.monitoring.live_service import LiveService, configuration, eventually, live_service, load
from tests.monitoring.queries import MONITORING, filled, panel_queries, rules

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]

PLACEMENTS = {
    "demo-dense": [{"replicas": 2}, {"pipeline_parallel_size": 2}],
    "demo-moe": [{"tensor_parallel_size": 2, "enable_expert_parallel": True}],
}
"""The least that makes every collective: a start costs seconds for each rank."""

WINDOW = "10s"  # in place of Grafana's: longer than a step of Prometheus, shorter than the test
SCARCE = (
    "sum by (model_name) (ridgewalk_num_preemptions_total) > 0",
    "sum(ridgewalk_kv_blocks_swapped_in_total) > 0",
    "sum by (model_name) (ridgewalk_kv_throttled_seconds_total) > 0",
)
BOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))
MISSING = 'ridgewalk_scrape_missing_replicas{model_name="demo-moe"} == 1 and on () up{job="ridgewalk"} == 1'


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    with live_service(tmp_path_factory.mktemp("live"), configuration(PLACEMENTS, num_blocks=20)) as running:
        yield running


def test_every_panel_has_data_and_every_rule_works_under_load(service: LiveService) -> None:
    queries = {
        f"{query.board} / {query.panel}: {filled(query.expr, WINDOW)}": filled(query.expr, WINDOW)
        for path in BOARDS
        for query in panel_queries(json.loads(path.read_text()))
    }
    assert len(queries) > 50
    waiting = {**queries, **{expr: expr for expr in SCARCE}}

    def all_have_data() -> bool:
        for name, expr in list(waiting.items()):
            if service.query(expr):
                del waiting[name]
        return not waiting

    def all_rules_work() -> bool:
        return {rule["health"] for rule in service.rules()} == {"ok"}

    with load(service.url, {"demo-dense": 18, "demo-moe": 12}, max_tokens=120):
        assert eventually(all_have_data), "no data: " + "\n".join(waiting)
        assert eventually(all_rules_work), [rule for rule in service.rules() if rule["health"] != "ok"]

    assert {rule["name"] for rule in service.rules()} == {rule.get("alert") or rule["record"] for rule in rules()}
    ops = {sample["metric"]["op"] for sample in service.query("count by (op) (ridgewalk_collective_seconds_count)")}
    assert {"all_reduce", "send", "recv", "dispatch", "combine"} <= ops
    (longest,) = service.query('max(max_over_time(scrape_duration_seconds{job="ridgewalk"}[5m]))')
    print(f"\nlongest scrape of 4 replicas under load: {float(longest['value'][1]) * 1e3:.0f} ms")


def test_graphs_are_drawn_without_grafana(service: LiveService) -> None:
    picture = pytest.importorskip("monitoring.grafana.picture")  # Grafana's SDK wants Python 3.11
    window = picture.Window(time.time() - 60, time.time())
    for board in picture.BOARDS:
        graphs = picture.graphs_of(board)
        drawn = picture.draw(board.title, graphs, service.prometheus, window).get_axes()
        assert len([axis for axis in drawn if axis.lines]) == len(graphs)


def test_a_replica_that_hangs_or_dies_costs_a_scrape_only_its_own_figures(service: LiveService) -> None:
    (replica,) = [each for each in service.processes() if "ServeReplica" in title(each) and "demo-moe" in title(each)]

    async def scrape_while_it_dies() -> Scrape:
        sent = asyncio.Event()

        async def on_sent(*arguments: object) -> None:
            sent.set()

        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(on_sent)
        async with aiohttp.ClientSession(trace_configs=[trace]) as first, aiohttp.ClientSession() as second:
            scraping = asyncio.create_task(first.get(f"{service.url}/metrics"))
            await sent.wait()
            async with second.get(f"{service.url}/version") as after:  # the ingress has begun what came before
                assert after.status == 200
            assert not scraping.done()
            replica.kill()
            async with await scraping as reply:
                return Scrape.parse(await reply.text())

    replica.send_signal(signal.SIGSTOP)
    assert eventually(lambda: bool(service.query(MISSING)))  # one that hangs: Prometheus does not wait for long
    scrape = asyncio.run(scrape_while_it_dies())
    assert scrape.total("ridgewalk_scrape_missing_replicas", model_name="demo-moe") == 1
    assert scrape.total("ridgewalk_scrape_missing_replicas", model_name="demo-dense") == 0
    assert scrape.values_of("ridgewalk_placement_info", "model_name") == {"demo-dense"}
    assert scrape.total("ridgewalk_placement_info") == 3
    assert scrape.total("ridgewalk_requests_total", model_name="demo-moe") > 0  # what the ingress knows of it


def test_prometheus_ends_with_the_service(service: LiveService) -> None:
    family = service.processes()
    (prometheus,) = [process for process in family if process.name() == "prometheus"]
    (option,) = [part for part in prometheus.cmdline() if part.startswith("--config.file=")]
    folder = Path(option.removeprefix("--config.file=")).parent
    assert folder.is_dir()
    assert os.getpgid(prometheus.pid) == prometheus.pid  # a terminal's Ctrl-C passes it by ...
    assert os.getsid(prometheus.pid) == os.getsid(service.process.pid)  # ... and it has its share of busy cores
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    _, alive = psutil.wait_procs(family, timeout=0)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert not folder.exists()
    assert "warning: Prometheus" not in "".join(service.printed)


def title(process: psutil.Process) -> str:
    """What it calls itself."""
    return " ".join(process.cmdline())
