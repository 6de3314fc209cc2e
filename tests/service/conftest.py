"""One real service for all tests of this folder: Ray, HAProxy, two tensor-parallel ranks, the shipped model."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator

import httpx
import pytest
from rich.console import Console

from ridgewalk.config import ServeConfig
from ridgewalk.launch.service import base_url, running_service
from ridgewalk.load.scrape import Scrape
from ridgewalk.replica.host import free_port

MODEL = "demo-dense"


def service_config(**changes: object) -> ServeConfig:
    return ServeConfig.model_validate(
        {
            "host": "127.0.0.1",
            "port": free_port("127.0.0.1"),
            "models": [{"model": MODEL, "placements": [{"tensor_parallel_size": 2, "num_blocks": 1024}]}],
            **changes,
        }
    )


@pytest.fixture(scope="package")
def config() -> ServeConfig:
    return service_config()


@pytest.fixture(scope="package")
def service_url(config: ServeConfig) -> Iterator[str]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with running_service(config, Console(file=io.StringIO())):
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield base_url(config)


@pytest.fixture
def scrape(service_url: str) -> Callable[[], Scrape]:
    return lambda: Scrape.parse(httpx.get(f"{service_url}/metrics", timeout=10).text)
