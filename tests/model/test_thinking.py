"""Thinking budgets on the ranks: the tag that ends the thinking is forced in time, and only then."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.engine.sampling import ReasoningBudget, SamplingParams
from ridgewalk.kernels.torch_kernels import TorchKernels
from ridgewalk.model.sampler import SampleRow, sample
from ridgewalk.model.thinking import OPENS_WITHIN, Thinking

OPEN, CLOSE, WORD = 7, 8, 1


def must_end(budget: ReasoningBudget, output: list[int], cuts: list[int] | None = None) -> bool:
    thinking = Thinking(budget)
    for end in sorted(cuts or []):
        thinking.update(np.array(output[:end], dtype=np.int32))
    thinking.update(np.array(output, dtype=np.int32))
    return thinking.must_end


@pytest.mark.parametrize(
    ("begins_open", "output", "expected"),
    [
        (True, [], False),
        (True, [WORD] * 2, False),
        (True, [WORD] * 3, True),
        (True, [OPEN, WORD, WORD], False),  # some models open the block once more
        (True, [WORD, CLOSE, WORD, WORD, WORD], False),
        (False, [WORD] * 5, False),  # it does not think at all
        (False, [OPEN, WORD, WORD, WORD], True),
        (False, [WORD, OPEN, WORD, WORD, WORD], True),  # a newline came before the tag
        (False, [*[WORD] * OPENS_WITHIN, OPEN, WORD, WORD, WORD], False),  # the answer mentions the tag
        (False, [OPEN, CLOSE, OPEN, WORD, WORD, WORD], False),  # a second block is text
    ],
)
def test_thinking_must_end_after_as_many_tokens(begins_open: bool, output: list[int], expected: bool) -> None:
    assert must_end(ReasoningBudget(3, OPEN, CLOSE, begins_open), output) is expected


def test_a_budget_of_nothing_ends_thinking_where_it_begins() -> None:
    assert must_end(ReasoningBudget(0, OPEN, CLOSE, True), [])
    assert must_end(ReasoningBudget(0, OPEN, CLOSE, False), [OPEN])


@given(
    output=st.lists(st.sampled_from([OPEN, CLOSE, WORD]), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    budget=st.builds(ReasoningBudget, st.integers(0, 4), st.just(OPEN), st.just(CLOSE), st.booleans()),
)
def test_it_does_not_matter_in_which_pieces_the_output_came(
    output: list[int], cuts: list[int], budget: ReasoningBudget
) -> None:
    """A preempted or resumed sequence brings all its tokens at once."""
    assert must_end(budget, output, cuts) == must_end(budget, output)


def test_a_forced_token_is_reported_with_the_probability_that_the_model_gave_it() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(3))
    rows = [
        SampleRow(SamplingParams(max_tokens=9, logprobs=0), 4, 1, forced=CLOSE),
        SampleRow(SamplingParams(max_tokens=9, temperature=0.0), 4, 1),
    ]
    tokens, logprobs = sample(logits, rows, TorchKernels())
    assert tokens.tolist() == [CLOSE, logits[1].argmax()]
    assert logprobs is not None
    assert logprobs[0] is not None
    assert logprobs[0].logprob == pytest.approx(torch.log_softmax(logits[0], 0)[CLOSE].item())
