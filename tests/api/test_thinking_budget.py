"""What a chat asks of its thinking, as the budget that the ranks are told."""

from __future__ import annotations

from typing import Any

import pytest

from ridgewalk.api.backend import ServedModel
from ridgewalk.api.chat_template import ChatTemplate
from ridgewalk.engine.sampling import ReasoningBudget
from tests.api.conftest import CHATML, chat, client_of, make_model
from tests.api.fake_backend import FakeBackend

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def budgets(backend: FakeBackend, **fields: Any) -> list[ReasoningBudget | None]:
    async with client_of(backend) as client:
        response = await client.post(CHAT, json=chat(**fields))
    assert response.status_code == 200, response.text
    return [sequence.sampling.reasoning for sequence in backend.calls[-1][2]]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_reasoning_tokens": 30}, 30),
        ({"max_reasoning_tokens": 0}, 0),
        ({"reasoning_effort": "low"}, 20),
        ({"reasoning_effort": "medium"}, 50),
        ({"reasoning_effort": "high"}, 80),
        ({"reasoning_effort": "high", "max_reasoning_tokens": 30}, 30),
        ({"reasoning_effort": "low", "max_reasoning_tokens": 30}, 20),
    ],
)
async def test_effort_is_a_share_of_the_output_and_the_smaller_limit_counts(
    backend: FakeBackend, model: ServedModel, fields: dict[str, Any], expected: int
) -> None:
    opens, closes = model.tokenizer.token_id("<think>"), model.tokenizer.token_id("</think>")
    both = await budgets(backend, max_tokens=100, n=2, **fields)
    assert both == [ReasoningBudget(expected, opens, closes)] * 2  # type: ignore[arg-type]
    assert backend.calls[-1][2][0].sampling.reasoning_effort == fields.get("reasoning_effort", "")


async def test_a_prompt_that_opens_the_block_begins_inside_it(backend: FakeBackend) -> None:
    (budget,) = await budgets(backend, max_reasoning_tokens=3, chat_template_kwargs={"open_think": True})
    assert budget is not None
    assert budget.begins_open


async def test_who_asks_for_nothing_gets_no_budget(backend: FakeBackend) -> None:
    assert await budgets(backend) == [None]


@pytest.mark.parametrize("field", [{"reasoning_effort": "low"}, {"max_reasoning_tokens": 5}])
@pytest.mark.parametrize("tags", [None, ("<think>", "<no such token>")])
async def test_a_model_that_cannot_be_told_to_stop_thinking_refuses(
    field: dict[str, Any], tags: tuple[str, str] | None
) -> None:
    (name,) = field
    async with client_of(FakeBackend({"tiny": make_model(reasoning_tags=tags)})) as client:
        response = await client.post(CHAT, json=chat(**field))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    assert f"`{name}`" in response.json()["error"]["message"]


async def test_a_template_that_takes_the_effort_itself_needs_no_tag() -> None:
    template = ChatTemplate("{{- 'Effort: ' + reasoning_effort -}}" + CHATML)
    backend = FakeBackend({"tiny": make_model(reasoning_tags=None, chat_template=template)})
    assert await budgets(backend, reasoning_effort="low") == [None]


async def test_plain_completions_have_no_thinking_to_limit(backend: FakeBackend) -> None:
    async with client_of(backend) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "Hi", "max_reasoning_tokens": 5})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_reasoning_tokens"
