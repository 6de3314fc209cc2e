"""plan_memory: how many KV blocks fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.placement.memory import GIB, MemoryPlanError, plan_memory
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from tests.placement.test_model_spec import LLAMA_31_8B, QWEN3_0_6B

SMALL = ModelSpec.from_config(QWEN3_0_6B)
LARGE = ModelSpec.from_config(LLAMA_31_8B)


def plan(spec=SMALL, mesh=None, budget=8 * GIB, max_num_seqs=64, max_model_len=4096):
    return plan_memory(spec, mesh or Mesh(), "bfloat16", budget, 16, 2048, max_num_seqs, max_model_len)


def test_parts_fill_the_budget_but_for_less_than_a_block():
    result = plan()
    used = result.weight_bytes + result.activation_bytes + result.kv_bytes
    assert 0 <= result.budget_bytes - used < result.kv_bytes_per_block
    assert result.kv_tokens == result.num_blocks * 16
    assert result.kv_bytes_per_block == 16 * SMALL.kv_bytes_per_token(Mesh(), "bfloat16")


def test_no_more_blocks_than_sequences_can_fill():
    assert plan(budget=80 * GIB, max_num_seqs=4, max_model_len=1000).num_blocks == 4 * 63


def test_tensor_parallelism_releases_memory_for_kv():
    budget = 20 * GIB
    one = plan(LARGE, budget=budget, max_num_seqs=100)
    two = plan(LARGE, Mesh(tp=2), budget, max_num_seqs=100)
    assert two.weight_bytes < one.weight_bytes
    assert two.kv_tokens > 3 * one.kv_tokens


def test_weights_that_do_not_fit_are_named_with_a_remedy():
    with pytest.raises(MemoryPlanError, match=r"14\.96 GiB of weights .* gives 8\.00 GiB; raise --memory or -tp"):
        plan(LARGE)


def test_context_that_does_not_fit_is_named_with_a_remedy():
    with pytest.raises(MemoryPlanError, match=r"one sequence of 100000 tokens .* --max-model-len to \d+ or raise"):
        plan(max_model_len=100_000)


@given(st.integers(1, 64 * GIB), st.sampled_from([1, 2, 4, 8]), st.integers(1, 512), st.integers(1, 40960))
def test_a_plan_never_exceeds_its_budget_and_always_holds_one_sequence(budget, tp, max_num_seqs, max_model_len):
    try:
        result = plan(LARGE, Mesh(tp=tp), budget, max_num_seqs, max_model_len)
    except MemoryPlanError:
        return
    assert result.weight_bytes + result.activation_bytes + result.kv_bytes <= budget
    assert result.kv_tokens >= max_model_len
