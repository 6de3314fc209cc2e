"""A thinking budget over HTTP: the shipped model is made to answer after so many tokens of thinking."""

from __future__ import annotations

import httpx
import pytest

from tests.service.conftest import MODEL

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("budget", [0, 12])
def test_thinking_ends_at_its_budget_and_an_answer_follows(service_url: str, budget: int) -> None:
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": "What is 27 + 58?"}], "temperature": 0, "n": 2,
        "max_reasoning_tokens": budget,
    }  # fmt: skip
    reply = httpx.post(f"{service_url}/v1/chat/completions", json=body, timeout=60).json()
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["stop"] * 2
    assert all(choice["message"]["content"].strip() for choice in reply["choices"])
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2 * budget
