"""Fixtures: a model, a backend that is told what to say, and a client of the application in front of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from ridgewalk.api.app import build_app
from ridgewalk.api.backend import ServedModel
from ridgewalk.api.chat_template import ChatTemplate
from ridgewalk.api.tokenizer import Tokenizer
from tests.api import tokenizers_for_tests
from tests.api.fake_backend import FakeBackend

CHATML = """\
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('Role ' + message.role + '?') }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if open_think is defined and open_think %}{{- '<think>\\n' }}{%- endif %}
{%- endif %}
"""


def make_model(name: str = "tiny", tokenizer: Tokenizer | None = None, **changes: Any) -> ServedModel:
    """A model of the byte-level tokenizer with a ChatML template."""
    tokenizer = tokenizer or Tokenizer(tokenizers_for_tests.byte_level())
    fields: dict[str, Any] = {
        "chat_template": ChatTemplate(CHATML),
        "max_model_len": 512,
        "vocab_size": tokenizer.vocab_size + 8,  # models pad their embeddings
        "eos_token_ids": (tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>")),
        "created": 1_700_000_000,
    }
    return ServedModel(name=name, tokenizer=tokenizer, **(fields | changes))


@pytest.fixture(scope="session")
def model() -> ServedModel:
    return make_model()


@pytest.fixture
def backend(model: ServedModel) -> FakeBackend:
    return FakeBackend({model.name: model})


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(backend) as client:
        yield client


def client_of(backend: FakeBackend, **options: Any) -> httpx.AsyncClient:
    """A client of the application, without a socket."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(build_app(backend, **options)), base_url="http://test")


def chat(content: Any = "Hi", **fields: Any) -> dict[str, Any]:
    """A body for /v1/chat/completions."""
    return {"messages": [{"role": "user", "content": content}], **fields}


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(events: list[dict[str, Any]], key: str, index: int = 0) -> str:
    """The text of one choice's deltas."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(key) or "" for choice in choices)
