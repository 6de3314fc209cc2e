"""One scrape asks everyone there is: real peer servers and backends, and handles that answer as replicas would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import msgspec
import pytest

from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.replica.peer_metrics import PeerServer
from ridgewalk.replica.protocol import Introduction, ReplicaMetrics
from ridgewalk.replica.router_registry import register
from ridgewalk.replica.service_backend import ServiceBackend
from tests.metrics.builders import make_metrics, make_stats, value

EXPECTED = {"m": {"TP1": 2}}


class Replicas:
    """The replicas of the one deployment: Serve's list of them, and what each answers; a silent one answers nothing."""

    def __init__(self) -> None:
        self.listed: list[str] = []
        self.silent: set[str] = set()
        self.ingresses: list[Introduction] = []  # that the replicas know
        self.is_initialized = True
        self.deployment_id = SimpleNamespace(app_name="test_scrape", name="m-TP1")
        self.metrics = self.introduce = self  # handle.metrics.remote(...)

    @property
    def curr_replicas(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(unique_id=name) for name in self.listed]

    async def remote(self, introduction: bytes | None = None, *, replica_id: str) -> bytes | None:
        if introduction is not None:
            return None  # as one that has failed: no channel is opened
        if replica_id in self.silent:
            await asyncio.Event().wait()
        metrics = make_metrics(replica_id)
        metrics.on_stats(make_stats(prompt_tokens=10))
        return msgspec.msgpack.encode(ReplicaMetrics(metrics.snapshot(), self.ingresses))


class Ingress:
    """A backend with its own counters, and the server that others ask."""

    def __init__(self, name: str, replicas: Replicas) -> None:
        self.metrics = IngressMetrics(name, ["m"])
        self.server = PeerServer(f"secret-{name}", self.metrics.snapshot)
        self._name, self._replicas = name, replicas

    async def start(self) -> Ingress:
        self.introduction = Introduction(self._name, f"secret-{self._name}", await self.server.start("127.0.0.1"))
        self.backend = ServiceBackend(
            [SimpleNamespace(name="m", max_model_len=64)],  # type: ignore[list-item]
            {"m": {"TP1": self._replicas}},  # type: ignore[dict-item]
            EXPECTED,
            {"m": "kv_growth"},
            self.metrics,
            self.introduction,
            self.server,
        )
        return self

    async def scrape(self, timeout_s: float = 5.0) -> bytes:
        return await self.backend.metrics(timeout_s)


@pytest.fixture
def replicas() -> Replicas:
    made = Replicas()
    register("test_scrape", "m-TP1", made)  # type: ignore[arg-type]
    return made


@pytest.fixture
async def ingresses(replicas: Replicas) -> AsyncIterator[list[Ingress]]:
    made = [await Ingress(name, replicas).start() for name in ("0", "1")]
    replicas.ingresses = [each.introduction for each in made]
    yield made
    for each in made:
        each.backend.close()


async def test_replicas_that_serve_no_longer_lists_are_missing_and_so_are_silent_ones(
    replicas: Replicas, ingresses: list[Ingress]
) -> None:
    found = []
    for listed, silent in [(["a", "b"], []), (["a"], []), (["a", "b"], ["b"]), ([], []), (["a", "b", "c"], [])]:
        replicas.listed, replicas.silent = listed, set(silent)
        text = await ingresses[0].scrape(0.5 if silent else 5.0)
        found.append(value(text, "scrape_missing_replicas", model_name="m", placement="TP1"))
    assert found == [0, 1, 1, 2, 0]


async def test_either_ingress_answers_for_both(replicas: Replicas, ingresses: list[Ingress]) -> None:
    replicas.listed = ["a"]
    ingresses[0].metrics.on_request("m", "/v1/completions")
    ingresses[1].metrics.on_error("m", 429)
    first, text = [await each.scrape() for each in ingresses]
    assert [value(text, "scrapes_total", ingress=name) for name in "01"] == [1, 1]
    assert first == text.replace(b'scrapes_total{ingress="1"} 1', b'scrapes_total{ingress="1"} 0')
    assert value(text, "requests_total", ingress="0", endpoint="completions") == 1
    assert value(text, "request_errors_total", ingress="1") == 1
    assert value(text, "scrape_missing_ingresses") == 0


async def test_counters_of_an_ingress_stay_while_no_replica_lists_it(
    replicas: Replicas, ingresses: list[Ingress]
) -> None:
    """All replicas are down, then one is back that only the ingress asked has found so far."""
    replicas.listed = ["a"]
    ingresses[1].metrics.on_request("m", "/v1/completions")
    await ingresses[0].scrape()
    replicas.listed = []
    assert value(await ingresses[0].scrape(), "requests_total", ingress="1", endpoint="completions") == 1
    replicas.listed, replicas.ingresses = ["b"], [ingresses[0].introduction]
    assert value(await ingresses[0].scrape(), "requests_total", ingress="1", endpoint="completions") == 1


async def test_an_ingress_that_is_gone_is_missing_while_listed_and_then_forgotten(
    replicas: Replicas, ingresses: list[Ingress]
) -> None:
    replicas.listed = ["a"]
    await ingresses[0].scrape()
    ingresses[1].server.close()
    text = await ingresses[0].scrape()
    assert value(text, "scrape_missing_ingresses") == 1
    assert value(text, "requests_total", ingress="1", endpoint="completions") is None
    replicas.ingresses = [ingresses[0].introduction]
    assert value(await ingresses[0].scrape(), "scrape_missing_ingresses") == 0
    assert ingresses[0].backend._peers == {}
