"""The demo tokenizer and its chat template."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ridgewalk.zoo import list_zoo, zoo_path
from ridgewalk.zoo.data import EMPTY_THINK, make_example, prompt_of, turn
from ridgewalk.zoo.problems import sample_problems
from ridgewalk.zoo.tokenizer import TEMPLATE_FILE

DEMO = zoo_path("demo-dense")
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
CONTROL = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


@given(st.text(max_size=200))
def test_any_text_comes_back(text: str) -> None:
    if not any(token in text for token in CONTROL):
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@pytest.mark.parametrize(
    "text", ["naïve 東京 🚶🏽‍♀️", "\x00\x7f\u2028", "a\n\n\n b\t\r\n", "<think>\nx\n</think>\n\n1", "e\u0301 é", "½ ١٢٣"]
)
def test_awkward_texts_come_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_every_byte_has_a_token() -> None:
    for byte in range(256):
        text = bytes([0xC3, 0x80 + byte % 64]).decode() if byte >= 128 else chr(byte)
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text
    assert not any(TOKENIZER.encode("".join(map(chr, range(1, 0x3000)))).special_tokens_mask)


def test_each_digit_is_its_own_token() -> None:
    assert [TOKENIZER.decode([i]) for i in TOKENIZER.encode("12345").ids] == list("12345")
    tokens = TOKENIZER.get_vocab()
    assert not [t for t in tokens if len(t) > 1 and any(c.isdigit() for c in t)]


def test_thoughts_stay_in_decoded_text_and_turns_do_not() -> None:
    ids = TOKENIZER.encode("<think>\nx\n</think>\n\n19<|im_end|>").ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<think>\nx\n</think>\n\n19"
    for token in ("<think>", "</think>", *CONTROL):
        assert TOKENIZER.encode(token).ids == [TOKENIZER.token_to_id(token)]


def test_ids_agree_with_the_configs() -> None:
    for name in ("config.json", "generation_config.json"):
        config = json.loads((DEMO / name).read_text())
        assert config["eos_token_id"] == TOKENIZER.token_to_id("<|im_end|>")
        assert config["pad_token_id"] == TOKENIZER.token_to_id("<|endoftext|>")
    assert json.loads((DEMO / "config.json").read_text())["vocab_size"] == TOKENIZER.get_vocab_size()


def _render(messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """As a server does it: jinja2 alone."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((DEMO / "chat_template.jinja").read_text()).render(messages=messages, **kwargs)


QUESTION = {"role": "user", "content": "What is 12 + 7?"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [QUESTION],
    [{"role": "system", "content": "You are a helpful assistant."}, QUESTION],
    [
        QUESTION,
        {"role": "assistant", "content": "<think>\n12 + 7\n</think>\n\n19"},
        {"role": "user", "content": "2+2="},
    ],
    [QUESTION, {"role": "assistant", "content": "19", "reasoning_content": "12 + 7 = 19"}],
    [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 * 4?"}]}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_transformers_renders_the_same(
    messages: list[dict[str, Any]], generate: bool, options: dict[str, bool]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **options)
    rendered = _render(messages, add_generation_prompt=generate, **options)
    assert rendered == expected
    assert tokenizer(expected)["input_ids"] == TOKENIZER.encode(rendered).ids


def test_the_template_renders_what_the_model_was_trained_on() -> None:
    for problem in sample_problems(20):
        messages = [{"role": "user", "content": problem.question}]
        assert _render(messages, add_generation_prompt=True) == prompt_of(problem.question)
    system = [{"role": "system", "content": "You are a helpful assistant."}, QUESTION]
    before = turn("system", "You are a helpful assistant.")
    assert _render(system, add_generation_prompt=True) == prompt_of(QUESTION["content"], before)
    assert _render(system, add_generation_prompt=True, enable_thinking=False).endswith(EMPTY_THINK)


def test_earlier_thoughts_are_left_out_and_the_last_answer_keeps_its_own() -> None:
    followed = _render(CONVERSATIONS[2], add_generation_prompt=True)
    assert "<think>" not in followed
    assert turn("assistant", "19") in followed
    assert "<think>\n12 + 7 = 19\n</think>\n\n19" in _render(CONVERSATIONS[3])


def test_training_conversations_come_back_through_the_tokenizer() -> None:
    rng = random.Random(1)
    for _ in range(100):
        example = make_example(rng)
        ids = TOKENIZER.encode(example.prompt).ids + TOKENIZER.encode(example.output).ids
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == example.prompt + example.output


def test_the_shipped_template_is_the_packages() -> None:
    for name in list_zoo():
        template = (zoo_path(name) / "chat_template.jinja").read_text()
        assert template == TEMPLATE_FILE.read_text()
        assert json.loads((zoo_path(name) / "tokenizer_config.json").read_text())["chat_template"] == template


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    with pytest.raises(KeyError, match="demo-dense"):
        zoo_path("demo-huge")
