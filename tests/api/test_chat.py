"""/v1/chat/completions."""

from __future__ import annotations

import httpx
import pytest

from ridgewalk.api.backend import Sequence, ServedModel
from ridgewalk.api.chat_template import ChatTemplate
from ridgewalk.api.tokenizer import Tokenizer
from tests.api.conftest import chat, client_of, events_of, joined, make_model
from tests.api.fake_backend import FakeBackend, Step, say
from tests.api.tokenizers_for_tests import byte_fallback, byte_level

URL = "/v1/chat/completions"
THOUGHT = "<think>\nLet me think.\n</think>\n\nThe dog, 東京 🙂."


async def ask(client: httpx.AsyncClient, **fields: object) -> dict:
    response = await client.post(URL, json=chat(**fields))
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, **fields: object) -> list[dict]:
    response = await client.post(URL, json=chat(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response)


async def test_plain_answer(client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel) -> None:
    reply = await ask(client)
    (choice,) = reply["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hello there.",
        "refusal": None,
        "reasoning_content": None,
        "reasoning": None,
    }
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] is None
    assert choice["logprobs"] is None
    assert reply["id"].startswith("chatcmpl-")
    name, request_id, (sequence,) = backend.calls[0]
    assert (name, request_id) == ("tiny", reply["id"])
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert sequence.prompt_token_ids == model.tokenizer.encode(prompt)
    assert sequence.sampling.max_tokens == model.max_model_len - len(sequence.prompt_token_ids)
    num_tokens = len(model.tokenizer.encode("Hello there.")) + 1  # and EOS
    assert reply["usage"] == {
        "prompt_tokens": len(sequence.prompt_token_ids),
        "completion_tokens": num_tokens,
        "total_tokens": len(sequence.prompt_token_ids) + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert backend.streams[0].closed.is_set()


@pytest.mark.parametrize("per_event", [1, 2, 7])
async def test_stream_says_what_the_whole_answer_says(backend: FakeBackend, per_event: int) -> None:
    backend.script = lambda model, sequences: say(model, sequences, THOUGHT, per_event)
    async with client_of(backend) as client:
        whole = await ask(client)
        events = await stream(client, stream_options={"include_usage": True})
    message = whole["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Let me think.", "The dog, 東京 🙂.")
    assert message["reasoning_content"] == message["reasoning"]
    assert joined(events, "content") == message["content"]
    assert joined(events, "reasoning") == joined(events, "reasoning_content") == message["reasoning"]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"]][-2:] == [None, "stop"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])


async def test_reasoning_tokens_are_exact(backend: FakeBackend, model: ServedModel, client: httpx.AsyncClient) -> None:
    backend.text = THOUGHT
    reply = await ask(client)
    inside = THOUGHT.partition("<think>")[2].partition("</think>")[0]
    expected = len(model.tokenizer.encode(inside))
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == expected


async def test_template_that_opens_the_tag(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    backend.text = "hm\n</think>\n\nYes."
    reply = await ask(client, chat_template_kwargs={"open_think": True})
    assert reply["choices"][0]["message"]["reasoning"] == "hm"
    assert reply["choices"][0]["message"]["content"] == "Yes."


async def test_answer_cut_while_reasoning_has_no_content(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    backend.text = THOUGHT
    reply = await ask(client, max_tokens=4)
    message = reply["choices"][0]["message"]
    assert message["content"] is None
    assert "Let me think.".startswith(message["reasoning"].strip())
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("late_end", [False, True])
async def test_tags_may_be_special_tokens(late_end: bool) -> None:
    model = make_model(tokenizer=Tokenizer(byte_level(tags_are_special=True)))

    def script(model: ServedModel, sequences: list[Sequence]) -> list[Step]:
        return say(model, sequences, THOUGHT, 3, late_end)

    async with client_of(FakeBackend({"tiny": model}, script=script)) as client:
        message = (await ask(client))["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Let me think.", "The dog, 東京 🙂.")


async def test_byte_fallback_model() -> None:
    tokenizer = Tokenizer(byte_fallback())
    model = make_model(tokenizer=tokenizer, eos_token_ids=(2,), chat_template=ChatTemplate("{{ messages[0].content }}"))
    async with client_of(FakeBackend({"tiny": model}, text="a dog 🙂.")) as client:
        events = await stream(client)
        whole = await ask(client)
    assert joined(events, "content") == whole["choices"][0]["message"]["content"] == "a dog 🙂."


async def test_several_choices(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    reply = await ask(client, n=3, seed=7)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    sequences = backend.calls[0][2]
    assert sequences[0].sampling.seed == 7
    assert len({sequence.sampling.seed for sequence in sequences}) == 3
    assert reply["usage"]["prompt_tokens"] == len(sequences[0].prompt_token_ids)
    events = await stream(client, n=3)
    assert [joined(events, "content", index) for index in range(3)] == ["Hello there."] * 3
    finishes = [c["index"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert sorted(finishes) == [0, 1, 2]


@pytest.mark.parametrize("streamed", [False, True])
async def test_stop_string(backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel, streamed: bool) -> None:
    backend.text = "One and two are three; END of it."
    if streamed:
        events = await stream(client, stop=["END", "nothing"], stream_options={"include_usage": True})
        text, usage = joined(events, "content"), events[-1]["usage"]
        choice = next(c for e in events for c in e["choices"] if c["finish_reason"])
    else:
        reply = await ask(client, stop=["END", "nothing"])
        (choice,), usage = reply["choices"], reply["usage"]
        text = choice["message"]["content"]
    assert text == "One and two are three; "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")
    assert backend.streams[0].finish_calls == [(0, "stop")]
    ids = model.tokenizer.encode(backend.text)
    used = next(n for n in range(len(ids)) if "END" in model.tokenizer.decode(ids[:n]))
    assert usage["completion_tokens"] == used


async def test_stop_string_in_an_event_of_many_tokens(backend: FakeBackend, model: ServedModel) -> None:
    backend.script = lambda model, sequences: say(model, sequences, "One END two", per_event=50)
    async with client_of(backend) as client:
        reply = await ask(client, stop="END", include_stop_str_in_output=True, return_token_ids=True)
    assert reply["choices"][0]["message"]["content"] == "One END"
    ids = reply["choices"][0]["token_ids"]
    assert reply["usage"]["completion_tokens"] == len(ids)
    assert "END" in model.tokenizer.decode(ids)
    assert "END" not in model.tokenizer.decode(ids[:-1])


async def test_stop_string_within_reasoning(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    backend.text = THOUGHT
    reply = await ask(client, stop="think.")
    assert reply["choices"][0]["message"]["reasoning"] == "Let me "
    assert reply["choices"][0]["message"]["content"] is None


async def test_text_that_only_begins_a_stop_string_is_shown(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    backend.text = "the EN"
    assert (await ask(client, stop="END"))["choices"][0]["message"]["content"] == "the EN"
    assert joined(await stream(client, stop="END"), "content") == "the EN"


async def test_min_tokens_holds_off_stop_strings(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    backend.text = "and and and and and and"
    reply = await ask(client, stop="and", min_tokens=3)
    assert reply["usage"]["completion_tokens"] >= 3
    assert reply["choices"][0]["message"]["content"].startswith("and ")


@pytest.mark.parametrize("late_end", [False, True])
async def test_stop_token(backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel, late_end: bool) -> None:
    dot = model.tokenizer.encode(".")[0]

    def script(model: ServedModel, sequences: list[Sequence]) -> list[Step]:
        assert dot in sequences[0].sampling.stop_token_ids
        steps = say(model, sequences, "Yes.", late_end=late_end)
        return _stopped_by(dot, steps)

    backend.script = script
    (choice,) = (await ask(client, stop_token_ids=[dot]))["choices"]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Yes", dot)
    (choice,) = (await ask(client, stop_token_ids=[dot], include_stop_str_in_output=True))["choices"]
    assert choice["message"]["content"] == "Yes."


def _stopped_by(token_id: int, steps: list[Step]) -> list[Step]:
    from ridgewalk.api.backend import TokenEvent

    kept = [event for step in steps for event in step if isinstance(step, list) and event.finish_reason is None]
    ids = [i for event in kept for i in event.token_ids]
    ids = ids[: ids.index(token_id) + 1] if token_id in ids else [*ids, token_id]
    return [[TokenEvent(0, ids)], [TokenEvent(0, [], finish_reason="stop", stop_token_id=token_id)]]


async def test_special_tokens_are_shown_on_request(backend: FakeBackend, model: ServedModel) -> None:
    backend.text = "a<|im_start|>b"
    async with client_of(backend) as client:
        hidden = await ask(client)
        shown = await ask(client, skip_special_tokens=False)
    assert hidden["choices"][0]["message"]["content"] == "ab"
    assert shown["choices"][0]["message"]["content"] == "a<|im_start|>b"  # and never the EOS that ended it


async def test_ignore_eos(backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel) -> None:
    await ask(client, ignore_eos=True, max_completion_tokens=5, min_tokens=5)
    sampling = backend.calls[0][2][0].sampling
    assert (sampling.stop_token_ids, sampling.max_tokens, sampling.min_tokens) == ((), 5, 5)
    await ask(client)
    assert backend.calls[1][2][0].sampling.stop_token_ids == model.eos_token_ids


async def test_sampling_reaches_the_backend(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    fields = {
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
    }
    await ask(client, **fields, logit_bias={"5": -100, "6": 1.5}, seed=-1)
    sampling = backend.calls[0][2][0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == ((5, -100.0), (6, 1.5))
    assert sampling.seed == 2**63 - 1
    await ask(client, top_p=0, temperature=1e-9, top_k=-1)
    sampling = backend.calls[1][2][0].sampling
    assert (sampling.top_p, sampling.top_k, sampling.temperature) == (1.0, 1, 0.0)


async def test_default_sampling_is_the_models() -> None:
    model = make_model(default_sampling={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01})
    backend = FakeBackend({"tiny": model})
    async with client_of(backend) as client:
        await ask(client)
        await ask(client, temperature=0, top_k=0, n=None)
    first, second = (call[2][0].sampling for call in backend.calls)
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.6, 0.95, 20, 0.01)
    assert (second.temperature, second.top_k, second.top_p) == (0.0, 0, 0.95)


async def test_seed_is_drawn_when_none_is_given(backend: FakeBackend, client: httpx.AsyncClient) -> None:
    await ask(client)
    await ask(client)
    first, second = (call[2][0].sampling.seed for call in backend.calls)
    assert first != second


async def test_logprobs(backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel) -> None:
    backend.text = "東京 is"
    reply = await ask(client, logprobs=True, top_logprobs=2)
    content = reply["choices"][0]["logprobs"]["content"]
    assert reply["choices"][0]["logprobs"]["refusal"] is None
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == "東京 is"
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in content)
    assert len(content) == reply["usage"]["completion_tokens"]
    events = await stream(client, logprobs=True, top_logprobs=2)
    streamed = [c["logprobs"]["content"] for e in events for c in e["choices"] if c["logprobs"]]
    assert [entry for entries in streamed for entry in entries] == content
    assert backend.calls[0][2][0].sampling.logprobs == 2
    await ask(client, logprobs=True)
    assert backend.calls[2][2][0].sampling.logprobs == 0


async def test_token_ids(backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel) -> None:
    reply = await ask(client, return_token_ids=True)
    expected = [*model.tokenizer.encode("Hello there."), model.eos_token_ids[0]]
    assert reply["choices"][0]["token_ids"] == expected
    assert reply["prompt_token_ids"] == backend.calls[0][2][0].prompt_token_ids
    events = await stream(client, return_token_ids=True)
    assert events[0]["prompt_token_ids"] == reply["prompt_token_ids"]
    assert all("prompt_token_ids" not in event for event in events[1:])
    ids = [i for event in events for choice in event["choices"] for i in choice.get("token_ids", [])]
    assert ids == expected


async def test_continuous_usage(client: httpx.AsyncClient) -> None:
    events = await stream(client, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[0] == 1


async def test_history_and_parts(backend: FakeBackend, client: httpx.AsyncClient, model: ServedModel) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}], "name": "x"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": []},
        {"role": "user", "content": "three"},
    ]
    response = await client.post(URL, json={"messages": messages, "model": "tiny", "user": "u", "metadata": {"a": 1}})
    assert response.status_code == 200
    prompt = model.tokenizer.decode(backend.calls[0][2][0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_long_prompts_are_answered_too(backend: FakeBackend) -> None:
    backend.models = {"tiny": make_model(max_model_len=50_000)}
    async with client_of(backend) as client:
        reply = await ask(client, content="the dog " * 4_000)
    assert reply["usage"]["prompt_tokens"] > 4_000


async def test_harmless_values_of_what_is_not_built(client: httpx.AsyncClient) -> None:
    await ask(
        client,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        reasoning_effort="low",
        store=False,
        temperature=None,
        logit_bias=None,
    )
