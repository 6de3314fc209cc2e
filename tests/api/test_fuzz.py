"""Nothing a client sends gives a 5xx: valid requests, mutated at random."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ridgewalk.api.app import build_app
from tests.api.conftest import make_model
from tests.api.fake_backend import FakeBackend

REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "x"},
                {"role": "assistant", "content": "x", "reasoning_content": "y"},
                {"role": "user", "content": "Hi"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_completion_tokens": 4,
            "n": 2,
            "stop": ["END"],
            "chat_template_kwargs": {"open_think": True},
            "tools": [],
            "response_format": {"type": "text"},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "temperature": 0.5,
            "top_p": 0.5,
            "top_k": 5,
            "min_p": 0.1,
            "seed": 5,
            "logit_bias": {"5": 1},
            "logprobs": True,
            "top_logprobs": 2,
            "stop_token_ids": [7],
            "min_tokens": 1,
            "max_tokens": 5,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "return_token_ids": True,
            "reasoning_effort": "low",
            "tool_choice": "none",
        },
    ),
    ("/v1/completions", {"prompt": ["One", "two"], "n": 2, "best_of": 2, "max_tokens": 3, "logprobs": 1}),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "echo": True, "stream": True, "suffix": None}),
    ("/tokenize", {"prompt": "One", "add_special_tokens": False, "return_token_strs": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {}}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]

NAMES = sorted(
    {name for _, body in REQUESTS for name in body} | {"guided_json", "modalities", "audio", "self", "caller"}
)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 5, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "user", "text", "none", "\ud800", "\x00", "<think>", "{{ 1 }}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything within a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    url, body = draw(st.sampled_from(REQUESTS))
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(body)[1:]))
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "delete", "add"])):
            case "replace":
                parent[path[-1]] = draw(VALUES)
            case "delete":
                del parent[path[-1]]
            case "add":
                body[draw(st.sampled_from(NAMES))] = draw(VALUES)
        if not places(body)[1:]:
            break
    raw = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=3)) + raw[at + draw(st.integers(0, 3)) :]
    return url, raw


async def post(url: str, raw: bytes) -> httpx.Response:
    backend = FakeBackend({"tiny": MODEL})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(build_app(backend)), base_url="http://t") as client:
        return await client.post(url, content=raw)


MODEL = make_model()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_nothing_gives_a_5xx(request_: tuple[str, bytes]) -> None:
    response = asyncio.run(post(*request_))  # an exception of the application would come out here
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
    else:
        assert b'"error"' not in response.content
