"""/v1/completions."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from ridgewalk.api.backend import ServedModel
from ridgewalk.api.tokenizer import Tokenizer
from tests.api.conftest import client_of, events_of, make_model
from tests.api.fake_backend import FakeBackend
from tests.api.tokenizers_for_tests import byte_fallback

URL = "/v1/completions"


async def ask(client: httpx.AsyncClient, prompt: Any = "One", **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, prompt: Any = "One", **fields: Any) -> list[dict[str, Any]]:
    return events_of(await client.post(URL, json={"prompt": prompt, "stream": True, **fields}))


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for e in events for c in e["choices"] if c["index"] == index)


async def test_answer_is_not_parted(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    backend.text = "<think>\nhm\n</think>\n\nYes."
    reply = await ask(client)
    assert reply["choices"][0]["text"] == backend.text
    assert text_of(await stream(client)) == backend.text
    assert reply["object"] == "text_completion"
    assert reply["id"].startswith("cmpl-")


async def test_default_limit_is_16(backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel) -> None:
    await ask(client)
    await ask(client, [5] * (model.max_model_len - 3))
    assert [call[2][0].sampling.max_tokens for call in backend.calls] == [16, 3]


async def test_no_tokens_but_the_prompt(backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel) -> None:
    reply = await ask(client, ["One", "two"], max_tokens=0, echo=True, n=2, logprobs=None)
    assert [choice["text"] for choice in reply["choices"]] == ["One", "One", "two", "two"]
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (
        sum(len(model.tokenizer.encode(text)) for text in ("One", "two")),
        0,
    )
    assert text_of(await stream(client, max_tokens=0, echo=True)) == "One"
    assert (await ask(client, max_tokens=0))["choices"][0]["text"] == ""
    await ask(client, [5] * model.max_model_len, max_tokens=0)
    too_long = await client.post(URL, json={"prompt": [5] * (model.max_model_len + 1), "max_tokens": 0})
    assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "prompt")
    both = await client.post(URL, json={"prompt": "One", "max_tokens": 0, "echo": True, "logprobs": 1})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "logprobs")
    assert backend.calls == []


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("One", ["One"]), (["One", "two"], ["One", "two"]), ([5, 6], [[5, 6]]), ([[5, 6], [7]], [[5, 6], [7]])],
)
async def test_forms_of_prompt(
    backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel, prompt: Any, texts: list[Any]
) -> None:
    reply = await ask(client, prompt, n=2, best_of=2)
    ids = [model.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    assert [s.prompt_token_ids for s in backend.calls[0][2]] == [i for i in ids for _ in range(2)]
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(ids)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_echo(client: httpx.AsyncClient, model: ServedModel) -> None:
    ids = model.tokenizer.encode("the dog")
    assert [c["text"] for c in (await ask(client, ["One ", "two "], echo=True, n=2))["choices"]] == [
        "One Hello there.",
        "One Hello there.",
        "two Hello there.",
        "two Hello there.",
    ]
    assert (await ask(client, ids, echo=True))["choices"][0]["text"] == "the dogHello there."
    assert text_of(await stream(client, "One ", echo=True)) == "One Hello there."


async def test_logprobs(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    reply = await ask(client, logprobs=2)
    logprobs = reply["choices"][0]["logprobs"]
    text = reply["choices"][0]["text"]
    for token, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
        assert text[offset : offset + len(token)] == token
    assert logprobs["token_logprobs"] == [-0.5] * reply["usage"]["completion_tokens"]
    assert all(top[token] == -0.5 for top, token in zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True))
    events = await stream(client, logprobs=2)
    for key in logprobs:
        parts = [c["logprobs"][key] for e in events for c in e["choices"] if c["logprobs"]]
        assert [entry for part in parts for entry in part] == logprobs[key]


async def test_token_ids_and_usage(backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel) -> None:
    expected = [*model.tokenizer.encode("Hello there."), model.eos_token_ids[0]]
    whole = await ask(client, return_token_ids=True)
    assert whole["choices"][0]["token_ids"] == expected
    assert whole["choices"][0]["prompt_token_ids"] == model.tokenizer.encode("One")
    events = await stream(client, return_token_ids=True, stream_options={"include_usage": True})
    assert events[0]["choices"][0]["prompt_token_ids"] == model.tokenizer.encode("One")
    assert [i for e in events for c in e["choices"] for i in c["token_ids"]] == expected
    assert events[-1]["usage"] == whole["usage"]
    assert "usage" not in (await stream(client))[0]


async def test_bos_of_the_tokenizer() -> None:
    backend = FakeBackend({"m": make_model("m", Tokenizer(byte_fallback()), eos_token_ids=(2,))}, text="a")
    async with client_of(backend) as client:
        await ask(client, "a")
        await ask(client, "a", add_special_tokens=False)
    assert [call[2][0].prompt_token_ids[0] == 1 for call in backend.calls] == [True, False]


async def test_text_continues_the_prompt() -> None:
    backend = FakeBackend({"m": make_model("m", Tokenizer(byte_fallback()), eos_token_ids=(2,))}, text="dog")
    async with client_of(backend) as client:
        assert (await ask(client, "a"))["choices"][0]["text"] == " dog"
        assert text_of(await stream(client, "a", echo=True)) == "a dog"
