"""Templates render exactly as transformers renders them."""

from __future__ import annotations

import pytest

from ridgewalk.api.chat_template import ChatTemplate, ChatTemplateError
from ridgewalk.api.reasoning import ReasoningSplitter
from tests.api import templates
from tests.api.tokenizers_for_tests import byte_level

TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}

CONVERSATIONS = [
    [{"role": "user", "content": "Hi <b>&'\" é 🙂"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hi\n"}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo."},
        {"role": "user", "content": "Three?"},
    ],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two.", "reasoning_content": "hm", "reasoning": "hm"},
    ],
]

KWARGS = [{}, {"enable_thinking": False}, {"enable_thinking": True, "extra": [1, "x"], "date_string": "1 Jan 2030"}]


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), **TOKENS)


@pytest.mark.parametrize("name", templates.ALL)
def test_renders_as_transformers_does(name: str, reference) -> None:
    template = ChatTemplate(templates.ALL[name], TOKENS)
    for messages in CONVERSATIONS:
        for kwargs in KWARGS:
            for add_generation_prompt in (True, False):
                expected = reference.apply_chat_template(
                    messages,
                    chat_template=templates.ALL[name],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **kwargs,
                )
                assert template.render(messages, add_generation_prompt, kwargs) == expected


def test_where_a_model_begins() -> None:
    messages = CONVERSATIONS[0]
    qwen, deepseek = ChatTemplate(templates.QWEN3), ChatTemplate(templates.DEEPSEEK_R1, TOKENS)
    assert ReasoningSplitter(deepseek.render(messages)).push("hm").reasoning == "hm"
    assert ReasoningSplitter(qwen.render(messages)).push("hm").content == "hm"
    assert ReasoningSplitter(qwen.render(messages, extra={"enable_thinking": False})).push("hm").content == "hm"


def test_a_template_may_refuse() -> None:
    with pytest.raises(ChatTemplateError, match=r"^Conversation roles must alternate"):
        ChatTemplate(templates.MISTRAL, TOKENS).render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize("source", ["{{ 1 // 0 }}", "{{ messages + 1 }}", "{{ x.y.z }}", "{{ ''.__class__.mro() }}"])
def test_any_failure_is_the_templates(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render([])


def test_a_template_cannot_change_what_it_is_given() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ChatTemplateError):
        ChatTemplate("{{ messages.append(1) }}").render(messages)
    assert len(messages) == 1


def test_broken_template() -> None:
    with pytest.raises(ChatTemplateError, match="cannot be compiled"):
        ChatTemplate("{% for %}")


def test_knows_role() -> None:
    assert ChatTemplate("{{ 'developer' }}").knows_role("developer")
    assert not ChatTemplate("{{ 'system' }} developer").knows_role("developer")
