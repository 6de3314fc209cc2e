"""The pace that a client asks for reaches the backend; one that cannot be meant is refused."""

from __future__ import annotations

import math

import httpx
import pytest

from ridgewalk.routing.latency_slo import LatencySlo
from tests.api.conftest import chat, client_of, make_model
from tests.api.fake_backend import FakeBackend

BODIES = {"/v1/chat/completions": chat(n=2), "/v1/completions": {"prompt": ["One", "Two"]}}


@pytest.mark.parametrize("path", BODIES)
async def test_headers_reach_the_backend_with_every_sequence(
    backend: FakeBackend, client: httpx.AsyncClient, path: str
) -> None:
    answer = await client.post(path, json=BODIES[path], headers={"X-SLO-TTFT-ms": "500", "x-llm-d-slo-tpot-ms": "12.5"})
    assert answer.status_code == 200, answer.text
    assert [each.slo for each in backend.calls[-1][2]] == [LatencySlo(0.5, 0.0125)] * 2
    await client.post(path, json=BODIES[path])
    assert backend.calls[-1][2][0].slo == LatencySlo(math.inf, math.inf)


async def test_a_header_goes_before_the_models_own() -> None:
    backend = FakeBackend({"tiny": make_model(slo=LatencySlo(2.0, 0.05))})
    async with client_of(backend) as client:
        for headers, expected in (
            ({}, (2.0, 0.05)),
            ({"x-slo-tpot-ms": "20"}, (2.0, 0.02)),
            ({"x-slo-ttft-ms": "0"}, (0.0, 0.05)),
        ):
            await client.post("/v1/chat/completions", json=chat(), headers=headers)
            assert backend.calls[-1][2][0].slo == LatencySlo(*expected)


@pytest.mark.parametrize("value", ["fast", "-1", "nan", "inf", "", "25ms"])
@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
async def test_bad_values_are_refused(client: httpx.AsyncClient, header: str, value: str) -> None:
    for path, body in BODIES.items():
        answer = await client.post(path, json=body, headers={header: value})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, header)
        assert "milliseconds" in error["message"]
