"""What the observer is told."""

from __future__ import annotations

from itertools import count

from ridgewalk.api.backend import BackendError
from tests.api.conftest import chat, client_of
from tests.api.fake_backend import FakeBackend, say


class Recorder:
    """Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        return lambda *args: self.calls.append((name, *args))

    def of(self, name: str) -> list[tuple]:
        return [call[1:] for call in self.calls if call[0] == name]


async def test_a_request_is_timed(backend: FakeBackend) -> None:
    seen, clock = Recorder(), count(100.0)
    backend.script = lambda model, sequences: say(model, sequences, "one two three", per_event=2)
    async with client_of(backend, observer=seen, clock=lambda: next(clock)) as client:
        usage = (await client.post("/v1/chat/completions", json=chat())).json()["usage"]
    events = backend.streams[0].num_read
    assert seen.of("on_request") == [("tiny", "/v1/chat/completions")]
    assert seen.of("on_first_token") == [("tiny", 1.0)]
    assert [call[:2] for call in seen.of("on_tokens")] == [("tiny", 1.0)] * (events - 1)
    assert 2 + sum(call[2] for call in seen.of("on_tokens")) == usage["completion_tokens"]
    assert seen.of("on_finish") == [("tiny", "stop", float(events), usage["prompt_tokens"], usage["completion_tokens"])]
    assert seen.of("on_error") == []


async def test_prompts_count_once(backend: FakeBackend) -> None:
    seen = Recorder()
    async with client_of(backend, observer=seen) as client:
        usage = (await client.post("/v1/completions", json={"prompt": ["a", "b c"], "n": 3})).json()["usage"]
    finishes = seen.of("on_finish")
    assert len(finishes) == 6
    assert sum(call[3] for call in finishes) == usage["prompt_tokens"]
    assert sum(call[4] for call in finishes) == usage["completion_tokens"]
    assert len(seen.of("on_first_token")) == 1


async def test_errors_are_counted_without_invented_labels(backend: FakeBackend) -> None:
    seen = Recorder()
    async with client_of(backend, observer=seen, api_keys=["k"]) as client:
        headers = {"authorization": "Bearer k"}
        await client.get("/v1/models")
        await client.get("/nowhere", headers=headers)
        await client.post("/v1/chat/completions", json=chat(model="x" * 50), headers=headers)
        await client.post("/v1/chat/completions", json=chat(n=0), headers=headers)
        await client.post("/v1/chat/completions", json=chat(max_tokens=10**6), headers=headers)
        backend.script = lambda model, sequences: [*say(model, sequences, "one")[:1], BackendError("Gone.", 503)]
        await client.post("/v1/chat/completions", json=chat(stream=True), headers=headers)
    assert seen.of("on_error") == [("", 401), ("", 404), ("", 404), ("", 400), ("tiny", 400), ("tiny", 503)]
