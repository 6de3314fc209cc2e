"""Weights and KV cache of the ranks of every mesh: hand-computed, and equal to what the ranks load."""

from __future__ import annotations

from math import prod

import pytest

from ridgewalk.model.sharding import shard_plan
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.placement.moe_spec import MoESpec
from ridgewalk.placement.stages import stage_layers
from tests.placement.hub_configs import (
    DEEPSEEK_R1,
    DEEPSEEK_V2_LITE,
    LLAMA_31_8B,
    MIXTRAL_8X7B,
    QWEN3_0_6B,
    QWEN3_30B_A3B,
)

R1 = ModelSpec.from_config(DEEPSEEK_R1)
MIXTRAL = ModelSpec.from_config(MIXTRAL_8X7B)


@pytest.mark.parametrize(
    ("mesh", "per_rank", "of_replica"),
    [
        (Mesh(), 70_272, 70_272),  # 61 layers x 576 values x 2 bytes
        (Mesh(tp=8), 70_272, 8 * 70_272),  # every rank holds the latent
        (Mesh(tp=8, expert_parallel=True), 70_272, 8 * 70_272),
        (Mesh(dp=8, expert_parallel=True), 70_272, 70_272),  # a token is in one group's cache
        (Mesh(tp=2, dp=4, expert_parallel=True), 70_272, 2 * 70_272),
        (Mesh(pp=4), 17 * 1152, 70_272),  # 17, 15, 15 and 14 layers
        (Mesh(pp=4, tp=2), 17 * 1152, 2 * 70_272),
        (Mesh(pp=2, dp=4, expert_parallel=True), 32 * 1152, 70_272),  # 32 and 29
    ],
)
def test_kv_bytes_per_token_of_r1(mesh, per_rank, of_replica):
    assert R1.kv_bytes_per_token(mesh, "bfloat16") == per_rank
    assert sum(R1.kv_bytes_per_token_per_stage(mesh, "bfloat16")) * mesh.tp == of_replica


@pytest.mark.parametrize(
    ("mesh", "per_rank"),
    [
        (Mesh(), 131_072),  # 32 layers x 2 x 8 heads x 128 x 2 bytes
        (Mesh(tp=4), 32_768),
        (Mesh(tp=16), 16_384),  # each of 8 heads twice
        (Mesh(dp=8, expert_parallel=True), 131_072),
        (Mesh(tp=2, pp=4), 16_384),  # 8 layers a stage
    ],
)
def test_kv_bytes_per_token_of_mixtral(mesh, per_rank):
    assert MIXTRAL.kv_bytes_per_token(mesh, "bfloat16") == per_rank


def test_expert_parallelism_divides_experts_and_repeats_the_rest():
    experts = 32 * 8 * 3 * 4096 * 14336
    others = MIXTRAL.num_parameters - experts
    data_parallel = Mesh(dp=4, expert_parallel=True)
    assert MIXTRAL.weight_bytes_per_rank(data_parallel, "bfloat16") == 2 * (others + experts // 4)
    assert MIXTRAL.weight_bytes_of_replica(data_parallel, "bfloat16") == 2 * (4 * others + experts)
    sliced = MIXTRAL.weight_bytes_per_rank(Mesh(tp=4), "bfloat16")
    assert MIXTRAL.weight_bytes_per_rank(Mesh(tp=4, expert_parallel=True), "bfloat16") == sliced


def test_redundant_experts_are_held_as_well():
    mesh, expert = Mesh(dp=2, tp=2, expert_parallel=True), 2 * 3 * 4096 * 14336
    more = MIXTRAL.weight_bytes_of_replica(mesh, "bfloat16", 4) - MIXTRAL.weight_bytes_of_replica(mesh, "bfloat16")
    assert more == 32 * 4 * expert
    one = MIXTRAL.weight_bytes_per_rank(mesh, "bfloat16", 4) - MIXTRAL.weight_bytes_per_rank(mesh, "bfloat16")
    assert one == 32 * expert


def test_fp8_checkpoints_count_as_what_they_are_held_in():
    routers = 58 * (256 * 7168 + 256)  # FP32
    assert R1.weight_bytes_per_rank(Mesh(), "bfloat16") == 2 * R1.num_parameters + 2 * routers


def test_ranks_of_a_pipeline_hold_the_model_once():
    mesh = Mesh(pp=3)
    assert sum(R1.weight_bytes_per_stage(mesh, "bfloat16")) == R1.weight_bytes_per_rank(Mesh(), "bfloat16")
    assert R1.weight_bytes_of_replica(mesh, "bfloat16") == R1.weight_bytes_of_replica(Mesh(), "bfloat16")


def test_a_tied_embedding_is_on_the_first_and_the_last_stage():
    spec = ModelSpec.from_config(QWEN3_0_6B)
    copy = spec.vocab_size * spec.hidden_size * 2
    held = spec.weight_bytes_of_replica(Mesh(pp=2), "bfloat16")
    assert held == spec.weight_bytes_of_replica(Mesh(), "bfloat16") + copy


def test_vocabulary_padding_is_held_but_no_copy():
    spec = ModelSpec.from_config({**LLAMA_31_8B, "vocab_size": 128255})
    norms = (2 * 32 + 1) * 4096
    held = 2 * spec.weight_bytes_per_rank(Mesh(tp=2), "bfloat16")
    assert held == 2 * (spec.num_parameters + norms + 2 * 4096)
    assert spec.weight_bytes_of_replica(Mesh(tp=2), "bfloat16") == 2 * (spec.num_parameters + norms)


SMALL = {"vocab_size": 97, "num_hidden_layers": 5}
SPECS = {
    "dense": ModelSpec.from_config({**QWEN3_0_6B, **SMALL}),
    "llama": ModelSpec.from_config({**LLAMA_31_8B, **SMALL, "attention_bias": True, "mlp_bias": True}),
    "mixtral": ModelSpec.from_config({**MIXTRAL_8X7B, **SMALL}),
    "qwen3_moe": ModelSpec.from_config({**QWEN3_30B_A3B, **SMALL, "decoder_sparse_step": 2, "num_experts": 16}),
    "v2_lite": ModelSpec.from_config({**DEEPSEEK_V2_LITE, **SMALL}),
    "r1": ModelSpec.from_config({**DEEPSEEK_R1, **SMALL}),
}


MESHES = [
    Mesh(),
    Mesh(tp=2),
    Mesh(tp=16),
    Mesh(pp=3),
    Mesh(tp=2, pp=2),
    Mesh(dp=2, expert_parallel=True),
    Mesh(tp=2, dp=2, pp=2, expert_parallel=True),
]


@pytest.mark.parametrize(
    ("spec", "mesh"),
    [
        pytest.param(spec, mesh, id=f"{name}-{mesh.name}")
        for name, spec in SPECS.items()
        for mesh in MESHES
        if spec.moe or not mesh.expert_parallel
    ],
)
def test_ranks_load_what_the_budget_counts(spec, mesh):
    per_stage = spec.weight_bytes_per_stage(mesh, "float32")
    for rank in range(mesh.world_size):
        plan = shard_plan(spec, mesh, rank)
        loaded = sum(prod(parameter.shape) for parameter in plan.values())
        assert 4 * loaded == per_stage[mesh.coordinates(rank)[1]]
    assert len(per_stage) == len(stage_layers(spec, mesh.pp))


def test_a_router_must_have_room_for_its_choices():
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        MoESpec(num_experts=4, top_k=5, intermediate_size=8, sparse_layers=(0,))
