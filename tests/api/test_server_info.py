"""Models, health, metrics, version, request ids, keys, tokenize and detokenize."""

from __future__ import annotations

import httpx
import pytest

from ridgewalk.api.backend import ServedModel
from tests.api.conftest import chat, client_of, make_model
from tests.api.fake_backend import FakeBackend


async def test_models(backend: FakeBackend) -> None:
    backend.models = {name: make_model(name) for name in ("b", "org/a model")}
    async with client_of(backend) as client:
        reply = (await client.get("/v1/models")).json()
        assert [card["id"] for card in reply["data"]] == ["b", "org/a model"]
        one = (await client.get("/v1/models/org/a model")).json()
    assert one == reply["data"][1]
    assert (one["object"], one["created"], one["max_model_len"]) == ("model", 1_700_000_000, 512)


async def test_health(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    response = await client.get("/health")
    assert (response.status_code, response.content) == (200, b"")
    backend.missing = "Model tiny has no live replica."
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == backend.missing


async def test_metrics_version_root(backend: FakeBackend) -> None:
    async with client_of(backend, version="1.2.3") as client:
        metrics = await client.get("/metrics")
        assert metrics.text == "ridgewalk_up 1\n"
        assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert (await client.get("/version")).json() == {"version": "1.2.3"}
        assert "/v1/chat/completions" in (await client.get("/")).json()["endpoints"]


@pytest.mark.parametrize(
    ("stated", "allowed"),
    [("1", 0.85), ("10", 4.0), ("0.2", 0.1), ("inf", 4.0), ("nan", 4.0), ("-1", 4.0), ("x", 4.0), (None, 4.0)],
)
async def test_a_scrape_is_answered_before_the_scraper_gives_up(
    backend: FakeBackend, client: httpx.AsyncClient, stated: str | None, allowed: float
) -> None:
    headers = {} if stated is None else {"X-Prometheus-Scrape-Timeout-Seconds": stated}
    await client.get("/metrics", headers=headers)
    assert backend.scrape_timeouts == [pytest.approx(allowed)]


async def test_request_ids(client: httpx.AsyncClient) -> None:
    first = await client.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "mine-1"})
    second = await client.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "mine-1"})
    assert first.headers["x-request-id"] == second.headers["x-request-id"] == "mine-1"
    assert first.json()["id"] != second.json()["id"]  # or two requests would be one to the engine
    made = await client.post("/v1/chat/completions", json=chat())
    assert made.json()["id"] == "chatcmpl-" + made.headers["x-request-id"]
    odd = await client.get("/nowhere", headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"] not in ("", "a b")


async def test_request_ids_are_left_to_a_server_that_adds_them(backend: FakeBackend) -> None:
    async with client_of(backend, adds_request_id=False) as client:
        assert "x-request-id" not in (await client.get("/nowhere", headers={"x-request-id": "mine"})).headers
        first, second = [(await client.post("/v1/chat/completions", json=chat())).json()["id"] for _ in range(2)]
    assert first != second


async def test_api_keys(backend: FakeBackend) -> None:
    async with client_of(backend, api_keys=["one", "zwö"]) as client:
        for headers in (
            {},
            {"authorization": "Bearer three"},
            {"authorization": "Bearer "},
            {"authorization": "Basic one"},
            {"authorization": "one"},
            {"authorization": b"Bearer \xff\xfe"},
        ):
            for url in ("/v1/models", "/nowhere", "/health/"):
                response = await client.get(url, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        for key in ("one", "zwö"):
            response = await client.get("/v1/models", headers={"authorization": f"bearer {key}".encode()})
            assert response.status_code == 200
        for url in ("/health", "/version", "/metrics", "/"):
            assert (await client.get(url)).status_code == 200


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_refused_at_the_start(backend: FakeBackend, key: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        client_of(backend, api_keys=["one", key])


async def test_tokenize_and_back(client: httpx.AsyncClient, model: ServedModel) -> None:
    text = "<|im_start|>東京 the dog"
    reply = (await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert reply["tokens"] == model.tokenizer.encode(text)
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 512)
    assert len(reply["token_strs"]) == reply["count"]
    assert (await client.post("/detokenize", json={"tokens": reply["tokens"]})).json() == {"prompt": text}


async def test_tokenize_messages(client: httpx.AsyncClient, model: ServedModel) -> None:
    messages = chat()["messages"]
    prompt = "<|im_start|>user\nHi<|im_end|>\n"
    for fields, expected in (
        ({}, prompt + "<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, prompt),
        ({"chat_template_kwargs": {"open_think": True}}, prompt + "<|im_start|>assistant\n<think>\n"),
    ):
        reply = (await client.post("/tokenize", json={"messages": messages, **fields})).json()
        assert reply["tokens"] == model.tokenizer.encode(expected)


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": chat()["messages"]}),
        ("/tokenize", {"prompt": ["x"]}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [10_000]}),
        ("/detokenize", {"tokens": "x"}),
    ],
)
async def test_bad_tokenize(client: httpx.AsyncClient, url: str, body: dict) -> None:
    assert (await client.post(url, json=body)).status_code == 400
