"""The real client, over a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import openai
import pytest
import uvicorn

from ridgewalk.api.app import build_app
from ridgewalk.api.backend import BackendError
from tests.api.conftest import make_model
from tests.api.fake_backend import FakeBackend, say

MESSAGES = [{"role": "user", "content": "Hi"}]
THOUGHT = "<think>\nhm\n</think>\n\nYes, 東京 🙂."


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, FakeBackend]]:
    backend = FakeBackend({"tiny": make_model()}, text=THOUGHT)
    config = uvicorn.Config(build_app(backend, api_keys=["secret"]), log_level="warning", lifespan="off")
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    uvicorn_server = Server(config)
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert started.wait(30)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", backend
    uvicorn_server.should_exit = True
    thread.join(30)


@pytest.fixture
def client(server: tuple[str, FakeBackend]) -> Iterator[openai.OpenAI]:
    server[1].script = None
    with openai.OpenAI(base_url=server[0], api_key="secret", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ridgewalk"


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1, n=2)
    message = reply.choices[1].message
    assert (message.content, message.reasoning_content) == ("Yes, 東京 🙂.", "hm")
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    assert len(reply.choices[0].logprobs.content) * 2 == reply.usage.completion_tokens


def test_chat_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        received = list(chunks)
    deltas = [chunk.choices[0].delta for chunk in received if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Yes, 東京 🙂."
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "hm"
    assert received[-1].usage.total_tokens > 0


def test_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt="x", max_tokens=40, logprobs=1)
    assert reply.choices[0].text == THOUGHT
    parts = client.completions.create(model="tiny", prompt="x", max_tokens=40, stream=True)
    assert "".join(part.choices[0].text for part in parts) == THOUGHT


async def test_async_client(server: tuple[str, FakeBackend], client: openai.OpenAI) -> None:
    async with openai.AsyncOpenAI(base_url=server[0], api_key="secret", max_retries=0) as asynchronous:
        reply = await asynchronous.chat.completions.create(model="tiny", messages=MESSAGES)
        assert reply.choices[0].message.content == "Yes, 東京 🙂."
        stream = await asynchronous.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "Yes, 東京 🙂."


def test_errors(server: tuple[str, FakeBackend], client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad_request:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=5)
    assert bad_request.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="guess").models.list()
    server[1].script = lambda model, sequences: [BackendError("Too busy.", 429, 1)]
    with pytest.raises(openai.RateLimitError) as busy:
        client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert busy.value.response.headers["retry-after"] == "1"


def test_error_within_a_stream(server: tuple[str, FakeBackend], client: openai.OpenAI) -> None:
    server[1].script = lambda model, sequences: [*say(model, sequences, "one")[:1], BackendError("Gone.", 503)]
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="Gone"):
        list(stream)


def test_closing_a_stream_ends_the_generation(server: tuple[str, FakeBackend], client: openai.OpenAI) -> None:
    import asyncio

    server[1].script = lambda model, sequences: [*say(model, sequences, "one two")[:2], asyncio.Event()]
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    next(iter(stream))
    generating = server[1].streams[-1]
    closed = threading.Event()
    aclose = generating.aclose

    async def observed_aclose() -> None:
        await aclose()
        closed.set()

    generating.aclose = observed_aclose
    stream.close()
    assert closed.wait(30)
