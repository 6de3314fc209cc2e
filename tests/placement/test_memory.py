"""plan_memory: how many KV blocks fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.kernels.block_scales import SCRATCH_VALUES
from ridgewalk.kernels.torch_experts import ROW_BLOCK
from ridgewalk.placement.activations import EXPERT_ROWS, FP8_SCRATCH, StepLimits, activation_bytes
from ridgewalk.placement.memory import GIB, MemoryPlan, MemoryPlanError, StageMemory, plan_memory
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from tests.placement.hub_configs import DEEPSEEK_R1, DEEPSEEK_V2_LITE, LLAMA_31_8B, QWEN3_0_6B

SMALL = ModelSpec.from_config(QWEN3_0_6B)
LARGE = ModelSpec.from_config(LLAMA_31_8B)
V2_LITE = ModelSpec.from_config(DEEPSEEK_V2_LITE)
R1 = ModelSpec.from_config(DEEPSEEK_R1)
LIMITS = StepLimits(max_num_batched_tokens=2048, max_num_seqs=64, max_model_len=4096)


def plan(spec=SMALL, mesh=None, budget=8 * GIB, max_num_seqs=64, max_model_len=4096):
    return plan_memory(spec, mesh or Mesh(), "bfloat16", budget, 16, 2048, max_num_seqs, max_model_len)


def test_a_refusal_names_the_limits_of_a_step_where_a_smaller_one_would_do():
    needed = plan(budget=400 * GIB, max_num_seqs=1024)
    (stage,) = needed.stages
    tight = stage.used_bytes(256) - stage.activation_bytes // 4  # 256 blocks are one sequence
    with pytest.raises(
        MemoryPlanError, match=r"lower --max-num-seqs or .*\(a step of 1,024 sequences and 2,048 tokens"
    ):
        plan(budget=tight, max_num_seqs=1024)
    with pytest.raises(MemoryPlanError, match=r"--memory gives 2.15 GiB; raise --memory"):
        plan(budget=tight - stage.activation_bytes // 2, max_num_seqs=1024)


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
    with pytest.raises(MemoryPlanError, match=r"14\.96 GiB of weights .* gives 8\.00 GiB; raise --memory, -tp or -pp"):
        plan(LARGE)


def test_context_that_does_not_fit_is_named_with_a_remedy():
    with pytest.raises(MemoryPlanError, match=r"one sequence of 100000 tokens .* --max-model-len to \d+ or raise"):
        plan(max_model_len=100_000)


@given(
    st.integers(1, 64 * GIB),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 6),
    st.integers(1, 512),
    st.integers(1, 40960),
    st.sampled_from([LARGE, V2_LITE]),
)
def test_no_rank_exceeds_its_budget_and_each_holds_one_sequence(budget, tp, pp, max_num_seqs, max_model_len, spec):
    try:
        result = plan(spec, Mesh(tp=tp, pp=pp), budget, max_num_seqs, max_model_len)
    except MemoryPlanError:
        return
    assert len(result.stages) == pp
    assert all(stage.used_bytes(result.num_blocks) <= budget for stage in result.stages)
    assert result.weight_bytes + result.activation_bytes + result.kv_bytes <= budget
    assert result.kv_tokens >= max_model_len
    assert result.blocks_within(budget) >= result.num_blocks


def test_the_stage_with_least_room_decides():
    mesh, budget = Mesh(tp=2, pp=4), 6 * GIB
    result = plan(V2_LITE, mesh, budget, max_num_seqs=500)
    rooms = [stage.blocks_within(budget) for stage in result.stages]
    assert result.num_blocks == min(rooms) < max(rooms)
    assert [stage.kv_bytes_per_block for stage in result.stages] == [16 * n * 1152 for n in (7, 7, 7, 6)]
    assert tuple(stage.weight_bytes for stage in result.stages) == V2_LITE.weight_bytes_per_stage(mesh, "bfloat16")


def test_figures_are_of_the_rank_that_uses_most():
    """Which one that is depends on the number of blocks."""
    heavy, wide = StageMemory(100, 10, 1), StageMemory(50, 10, 5)
    assert MemoryPlan(1000, (heavy, wide), 2, 16).tightest == heavy
    many = MemoryPlan(1000, (heavy, wide), 100, 16)
    assert (many.weight_bytes, many.activation_bytes, many.kv_bytes) == (50, 10, 500)
    assert (many.blocks_within(260), many.blocks_within(115), many.blocks_within(100)) == (40, 5, 0)


def test_redundant_experts_cost_kv():
    mesh = Mesh(dp=2, expert_parallel=True)
    without, with_more = (
        plan_memory(V2_LITE, mesh, "bfloat16", 32 * GIB, 16, 2048, 1000, 4096, redundant) for redundant in (0, 8)
    )
    assert with_more.weight_bytes - without.weight_bytes == 26 * 4 * 3 * 2048 * 1408 * 2
    assert with_more.num_blocks < without.num_blocks


def test_pipeline_stages_share_the_weights_of_a_model_too_large_for_one_rank():
    with pytest.raises(MemoryPlanError, match=r"at TP1, .* raise --memory, -tp or -pp"):
        plan(V2_LITE, budget=20 * GIB)
    assert plan(V2_LITE, Mesh(pp=2), budget=20 * GIB).kv_tokens >= 4096


ARRIVED = 2 * (7168 * 2 + 2 + 2 * 8)
"""Bytes of a row that arrived at a rank of R1, and of its result, with their tags and places."""


def test_room_for_every_row_that_a_router_can_send():
    """Each further attention group may send all 8 choices of all its tokens here."""
    (two,) = activation_bytes(R1, Mesh(dp=2, expert_parallel=True), "bfloat16", LIMITS)
    (four,) = activation_bytes(R1, Mesh(dp=4, expert_parallel=True), "bfloat16", LIMITS)
    assert four - two == 2 * 2048 * 8 * ARRIVED


def test_a_rank_cannot_receive_more_choices_of_a_token_than_it_has_experts():
    mesh = Mesh(dp=256, expert_parallel=True)
    (one,) = activation_bytes(R1, mesh, "bfloat16", LIMITS)
    (three,) = activation_bytes(R1, mesh, "bfloat16", LIMITS, num_redundant_experts=2 * 256)
    assert three - one == 256 * 2048 * 2 * ARRIVED


def test_tensor_parallel_ranks_dispatch_a_share_each():
    (alone,) = activation_bytes(R1, Mesh(tp=1, dp=8, expert_parallel=True), "bfloat16", LIMITS)
    (shared,) = activation_bytes(R1, Mesh(tp=8, dp=1, expert_parallel=True), "bfloat16", LIMITS)
    assert alone - shared > 7 * 2048 * 8 * ARRIVED


def test_only_stages_with_experts_and_the_last_need_room_for_them_and_for_logits():
    config = {**DEEPSEEK_R1, "num_hidden_layers": 4, "num_nextn_predict_layers": 0}
    spec = ModelSpec.from_config(config)
    first, last = activation_bytes(spec, Mesh(pp=2), "bfloat16", LIMITS)
    assert [spec.is_sparse(layer) for layer in (2, 3)] == [False, True]
    assert last - first > LIMITS.max_num_seqs * spec.vocab_size * 16


def test_experts_take_as_many_rows_at_once_as_the_budget_counts():
    assert EXPERT_ROWS == ROW_BLOCK


def test_products_with_fp8_weights_have_the_memory_that_the_budget_counts():
    assert FP8_SCRATCH == SCRATCH_VALUES
    plain, kept = (activation_bytes(R1, Mesh(tp=8), "bfloat16", LIMITS, keeps_fp8=on)[0] for on in (False, True))
    assert kept - plain == FP8_SCRATCH * (2 * 2 + 4 + 4 + 1)
