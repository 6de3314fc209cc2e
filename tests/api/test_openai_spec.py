"""Replies validate against OpenAI's own specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.api.conftest import chat, events_of
from tests.api.fake_backend import FakeBackend

SPEC = Path(__file__).parents[2].parent / "shared" / "openai" / "openapi.json"

pytestmark = pytest.mark.skipif(not SPEC.exists(), reason=f"OpenAI's specification is not at {SPEC}")


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """The components of the specification, as JSON Schema: there, ``nullable`` is not a word."""
    return _with_nulls(json.loads(SPEC.read_text())["components"])


def _with_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _with_nulls(item) for key, item in value.items()}
    if value.pop("nullable", False) is True:
        return {"anyOf": [value, {"type": "null"}]}
    return value


@pytest.fixture
def check(schemas: dict[str, Any]):
    def check(name: str, instance: Any) -> None:
        schema = {"components": schemas, "$ref": f"#/components/schemas/{name}"}
        jsonschema.Draft202012Validator(schema).validate(instance)

    return check


FIELDS: list[dict[str, Any]] = [
    {},
    {"logprobs": True, "top_logprobs": 2, "n": 2},
    {"stop": "three"},
    {"max_tokens": 3, "return_token_ids": True},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "stream": True},
]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("text", ["One, two, three.", "<think>\nhm\n</think>\n\nYes 🙂.", ""])
async def test_chat(backend: FakeBackend, client: httpx.AsyncClient, check, fields: dict[str, Any], text: str) -> None:
    backend.text = text
    if "stream" not in fields:
        check("CreateChatCompletionResponse", (await client.post("/v1/chat/completions", json=chat(**fields))).json())
    events = events_of(await client.post("/v1/chat/completions", json=chat(**(fields | {"stream": True}))))
    for event in events:
        check("CreateChatCompletionStreamResponse", event)


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": 2, "n": 2}, {"stop": "three", "echo": True}, {"max_tokens": 3}, {"max_tokens": 0}]
)
async def test_completions(backend: FakeBackend, client: httpx.AsyncClient, check, fields: dict[str, Any]) -> None:
    backend.text = "One, two, three."
    check("CreateCompletionResponse", (await client.post("/v1/completions", json={"prompt": "x", **fields})).json())


async def test_models_and_errors(client: httpx.AsyncClient, check) -> None:
    check("ListModelsResponse", (await client.get("/v1/models")).json())
    check("Model", (await client.get("/v1/models/tiny")).json())
    for response in (
        await client.get("/nowhere"),
        await client.get("/v1/completions"),
        await client.post("/v1/completions", content=b"{"),
        await client.post("/v1/chat/completions", json={**chat(), "n": 0}),
    ):
        check("ErrorResponse", response.json())
