"""How streams travel: in few chunks, with errors, and ended when their client leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from ridgewalk.api.app import build_app
from ridgewalk.api.backend import BackendError, TokenEvent
from ridgewalk.api.open_replies import OpenReplies
from tests.api.conftest import chat
from tests.api.fake_backend import FakeBackend, say
from tests.api.test_observer import Recorder

CHAT = "/v1/chat/completions"


class Connection:
    """One HTTP request at the level of ASGI, to see chunks and to hang up."""

    def __init__(self, backend: FakeBackend, body: Any, **options: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.hung_up = asyncio.Event()
        self._body = [json.dumps(body).encode()]
        self._app = build_app(backend, **options)

    async def run(self) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "headers": [],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "root_path": "",
            "http_version": "1.1",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def chunks(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message.get("body")]


async def test_one_chunk_for_each_batch(backend: FakeBackend) -> None:
    backend.script = lambda model, sequences: say(model, sequences, "one two three four", per_event=4)
    connection = Connection(backend, chat(stream=True, n=3))
    await connection.run()
    assert len(connection.chunks) == backend.streams[0].num_read + 1  # [DONE]
    assert connection.chunks[0].count(b"data: ") == 6  # three roles, three texts
    assert connection.sent[-1] == {"type": "http.response.body", "body": b""}


async def test_nothing_is_sent_for_text_that_is_held_back(backend: FakeBackend) -> None:
    backend.script = lambda model, sequences: [
        *([TokenEvent(0, [token])] for token in model.tokenizer.encode("𝄞")),
        [TokenEvent(0, [], finish_reason="length")],
    ]
    connection = Connection(backend, chat(stream=True))
    await connection.run()
    texts = [
        json.loads(chunk.split(b"data: ")[1])["choices"][0]["delta"].get("content") for chunk in connection.chunks[:-1]
    ]
    assert texts == ["", "𝄞", None]


@pytest.mark.parametrize("kind", ["backend", "broken off", "abort", "bug"])
async def test_error_within_a_stream(backend: FakeBackend, kind: str) -> None:
    def script(model, sequences):
        steps = say(model, sequences, "one two three")[:2]
        if kind == "backend":
            steps.append(BackendError("The replica died.", 503))
        if kind == "abort":
            steps.append([TokenEvent(0, [], finish_reason="abort")])
        if kind == "bug":
            steps.append([TokenEvent(99, [5])])
        return steps

    backend.script = script
    connection = Connection(backend, chat(stream=True))
    await connection.run()
    *_, last = connection.chunks
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["type"] == "server_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert connection.sent[0]["status"] == 200
    assert connection.sent[-1] == {"type": "http.response.body", "body": b""}
    assert backend.streams[0].closed.is_set()


async def test_answer_that_breaks_off_is_an_error_when_whole(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    backend.script = lambda model, sequences: say(model, sequences, "one two three")[:2]
    response = await client.post(CHAT, json=chat())
    assert response.status_code == 503
    assert "broke off" in response.json()["error"]["message"]


async def test_error_after_all_is_said_is_no_error(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    backend.script = lambda model, sequences: [*say(model, sequences, "one"), BackendError("Too late.", 503)]
    assert (await client.post(CHAT, json=chat())).status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 2])
async def test_disconnect_ends_the_generation(backend: FakeBackend, streamed: bool, tokens_before: int) -> None:
    never, seen = asyncio.Event(), Recorder()
    backend.script = lambda model, sequences: [*say(model, sequences, "one two three")[:tokens_before], never]
    connection = Connection(backend, chat(stream=streamed), observer=seen)
    running = asyncio.create_task(connection.run())
    while not backend.streams:
        await asyncio.sleep(0)
    await backend.streams[0].waiting.wait()
    assert not backend.streams[0].closed.is_set()
    connection.hung_up.set()
    await running
    assert backend.streams[0].closed.is_set()
    assert seen.of("on_error") == [("tiny", 499)]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 1])
@pytest.mark.parametrize("hears_of_it", [False, True])
async def test_cancelled_request_ends_the_generation(
    backend: FakeBackend, streamed: bool, tokens_before: int, hears_of_it: bool
) -> None:
    """As Serve does it when a client leaves; the application may or may not hear of the disconnect besides."""
    never, seen = asyncio.Event(), Recorder()
    backend.script = lambda model, sequences: [*say(model, sequences, "one two three")[:tokens_before], never]
    connection = Connection(backend, chat(stream=streamed), observer=seen)
    running = asyncio.create_task(connection.run())
    while not backend.streams:
        await asyncio.sleep(0)
    await backend.streams[0].waiting.wait()
    if hears_of_it:
        connection.hung_up.set()
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert backend.streams[0].closed.is_set()
    assert seen.of("on_error") == [("tiny", 499)]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 2])
async def test_a_server_that_ends_says_so(backend: FakeBackend, streamed: bool, tokens_before: int) -> None:
    never, seen, replies = asyncio.Event(), Recorder(), OpenReplies()
    backend.script = lambda model, sequences: [*say(model, sequences, "one two three")[:tokens_before], never]
    connection = Connection(backend, chat(stream=streamed), observer=seen, open_replies=replies)
    running = asyncio.create_task(connection.run())
    while not backend.streams:
        await asyncio.sleep(0)
    await backend.streams[0].waiting.wait()
    replies.end_all()
    await replies.wait_ended()  # all is written by then
    assert connection.sent[-1].get("more_body", False) is False
    await running
    begun = streamed and tokens_before > 0
    assert connection.sent[0]["status"] == (200 if begun else 503)
    last = connection.chunks[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert backend.streams[0].closed.is_set()
    late = Connection(backend, chat(stream=streamed), open_replies=replies)
    await late.run()
    assert late.sent[0]["status"] == 503
    assert seen.of("on_error") == [("tiny", 503)]


async def test_disconnect_before_the_body_is_complete(backend: FakeBackend) -> None:
    connection = Connection(backend, chat())
    connection._body.clear()
    connection.hung_up.set()
    await connection.run()
    assert backend.calls == []
