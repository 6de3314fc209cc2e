"""Whatever a client sends, the answer is a 4xx in OpenAI's shape that names the field."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from ridgewalk.api.backend import BackendError
from tests.api.conftest import chat, client_of, make_model
from tests.api.fake_backend import FakeBackend

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"max_reasoning_tokens": -1}, "max_reasoning_tokens"),
        ({"max_reasoning_tokens": "5"}, "max_reasoning_tokens"),
        ({"model": 5}, "model"),
        ({"stream": 1}, "stream"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 33}, "stop"),
        ({"stop": "a" * 513}, "stop"),
        ({"stop": [5]}, "stop[0]"),
        ({"stop_token_ids": [10_000]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"10000": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": None}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": "text"}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {}, "modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"guided_regex": "a*"}, "guided_regex"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
async def test_bad_chat_fields(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    error = error_of(await client.post(CHAT, json={**chat(), **fields}))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [5, [5]]}, "prompt"),
        ({"prompt": [[5], "a"]}, "prompt"),
        ({"prompt": [10_000]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [2**70]}, "prompt[0]"),
        ({"prompt": ["a"] * 100, "n": 100}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
async def test_bad_completion_fields(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert error_of(await client.post(COMPLETIONS, json={"prompt": "x", **fields}))["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "ignored": "\xff"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\udc00\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e400}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "ignored": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b"[" * 1_000_000,
    ],
)
async def test_broken_bodies(client: httpx.AsyncClient, body: bytes) -> None:
    error_of(await client.post(CHAT, content=body))


async def test_deep_template_kwargs(client: httpx.AsyncClient) -> None:
    deep = json.loads("[" * 400 + "]" * 400)
    response = await client.post(CHAT, json=chat(chat_template_kwargs={"open_think": deep, "extra": deep}))
    assert response.status_code == 200


async def test_a_refusing_template_is_quoted(backend: FakeBackend) -> None:
    from ridgewalk.api.chat_template import ChatTemplate

    backend.models = {"m": make_model("m", chat_template=ChatTemplate("{{ raise_exception('No, thanks.') }}"))}
    async with client_of(backend) as client:
        assert error_of(await client.post(CHAT, json=chat()))["message"] == "No, thanks."


async def test_model_without_template(backend: FakeBackend) -> None:
    backend.models = {"m": make_model("m", chat_template=None)}
    async with client_of(backend) as client:
        assert "no chat template" in error_of(await client.post(CHAT, json=chat()))["message"]
        assert (await client.post(COMPLETIONS, json={"prompt": "x"})).status_code == 200


async def test_unknown_model(client: httpx.AsyncClient) -> None:
    for url, body in ((CHAT, chat()), (COMPLETIONS, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        error = error_of(await client.post(url, json={**body, "model": "other"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_model_may_be_omitted_only_if_there_is_one(backend: FakeBackend) -> None:
    backend.models = {name: make_model(name) for name in ("a", "b/c")}
    async with client_of(backend) as client:
        error = error_of(await client.post(CHAT, json=chat()))
        assert error["param"] == "model"
        assert "a, b/c" in error["message"]
        assert (await client.post(CHAT, json=chat(model="b/c"))).json()["model"] == "b/c"


async def test_context_length(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(CHAT, json=chat(max_tokens=505)))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "512" in error["message"]
    assert "505" in error["message"]
    error = error_of(await client.post(COMPLETIONS, json={"prompt": [5] * 512}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    error = error_of(await client.post(CHAT, json=chat("x" * 5000)))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_context_may_be_filled_exactly(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": [5] * 500, "max_tokens": 12})
    assert response.status_code == 200
    error_of(await client.post(COMPLETIONS, json={"prompt": [5] * 500, "max_tokens": 13}))


async def test_body_limit(backend: FakeBackend) -> None:
    async def chunks():
        for _ in range(100):
            yield b" " * 50

    async with client_of(backend, max_body_bytes=1000) as client:
        assert error_of(await client.post(CHAT, content=b" " * 1001), 413)["code"] == "body_too_large"
        error_of(await client.post(CHAT, content=chunks()), 413)
        error_of(await client.post("/tokenize", content=chunks()), 413)
        error_of(await client.post(CHAT, content=b"x", headers={"content-length": "9" * 30}), 413)
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_routes(client: httpx.AsyncClient) -> None:
    error_of(await client.get("/v2/models"), 404)
    error_of(await client.get("/v1/models/"), 404)
    error_of(await client.get("/v1/models/none/such"), 404)
    error_of(await client.get("/v1/chat/completions/"), 404)
    for method, url in (("GET", CHAT), ("DELETE", "/v1/models/tiny"), ("POST", "/health"), ("OPTIONS", CHAT)):
        response = await client.request(method, url)
        error_of(response, 405)
        assert response.headers["allow"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_backend_refusals(backend: FakeBackend, client: httpx.AsyncClient, streamed: bool) -> None:
    backend.script = lambda model, sequences: [BackendError("Too busy.", 429, retry_after_s=2.1)]
    response = await client.post(CHAT, json=chat(stream=streamed))
    assert error_of(response, 429)["type"] == "rate_limit_exceeded"
    assert response.headers["retry-after"] == "3"
    backend.script = lambda model, sequences: [BackendError("No replica.", 503)]
    response = await client.post(COMPLETIONS, json={"prompt": "x", "stream": streamed})
    assert error_of(response, 503)["type"] == "server_error"
    assert "retry-after" not in response.headers
    backend.script = lambda model, sequences: [BackendError("It can never fit.", 400)]
    assert error_of(await client.post(CHAT, json=chat(stream=streamed)))["message"] == "It can never fit."
    assert all(stream.closed.is_set() for stream in backend.streams)
