"""Weights and KV cache of the ranks of every mesh: hand-computed, and equal to what the ranks load."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from ridgewalk.model.sharding import Parameter, shard_plan
from ridgewalk.model.tensor_rules import Precision
from ridgewalk.placement.memory import MemoryPlanError, plan_memory
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.placement.moe_spec import MoESpec
from ridgewalk.placement.stages import stage_layers
from ridgewalk.placement.weights import expert_bytes
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


def test_fp8_checkpoints_that_are_dequantized_count_in_the_compute_dtype():
    routers = 58 * (256 * 7168 + 256)  # FP32
    assert R1.weight_bytes_per_rank(Mesh(), "bfloat16") == 2 * R1.num_parameters + 2 * routers


def fp8(outputs: int, inputs: int) -> int:
    """Bytes of a matrix in blocks of 128 x 128."""
    return outputs * inputs + 4 * -(-outputs // 128) * -(-inputs // 128)


@pytest.mark.parametrize(
    ("mesh", "tp", "expert", "slots", "per_rank"),
    [
        (Mesh(tp=8), 8, 2048 // 8, 256, 85_480_886_816),  # of every expert an eighth: two blocks of 128
        (Mesh(dp=8, expert_parallel=True), 1, 2048, 32, 102_076_768_608),  # whole experts, attention on every rank
    ],
)
def test_ranks_of_r1_that_keep_fp8_fit_on_their_devices(mesh, tp, expert, slots, per_rank):
    hidden = 7168
    queries = fp8(1536, hidden) + fp8(128 * 192 // tp, 1536)
    latent = fp8(512 + 64, hidden) + 128 * 256 // tp * 512 * 2  # kv_b is dequantized
    norms = (1536 + 512 + 2 * hidden) * 2
    attention = queries + latent + fp8(hidden, 128 * 128 // tp) + norms
    dense = fp8(2 * 18432 // tp, hidden) + fp8(hidden, 18432 // tp)
    experts = slots * (fp8(2 * expert, hidden) + fp8(hidden, expert))
    shared = fp8(2 * 2048 // tp, hidden) + fp8(hidden, 2048 // tp)
    router = (256 * hidden + 256) * 4
    tables = (2 * 129280 // tp + 1) * hidden * 2  # embedding, head, the last norm
    held = 61 * attention + 3 * dense + 58 * (experts + shared + router) + tables
    assert R1.weight_bytes_per_rank(mesh, "bfloat16", keeps_fp8=True) == held == per_rank
    gpu = 141 * 10**9
    assert held < gpu
    plan = plan_memory(R1, mesh, "bfloat16", int(0.9 * gpu), 64, 2048, 64, 8192, keeps_fp8=True)
    assert plan.keeps_fp8
    assert plan.weight_bytes == held
    with pytest.raises(MemoryPlanError):
        plan_memory(R1, mesh, "bfloat16", int(0.9 * gpu), 64, 2048, 64, 8192)


def test_slices_of_r1_within_blocks_are_dequantized():
    """tp=32: 64 rows or columns of an expert are half a block; 576 of the dense layers are four and a half."""
    mesh, hidden = Mesh(tp=32), 7168
    cut = 58 * 257 * 3 * 64 * hidden + 3 * 3 * 576 * hidden
    narrow = 61 * (fp8(1536, hidden) + fp8(4 * 192, 1536) + fp8(576, hidden) + fp8(hidden, 4 * 128))
    others = 61 * (4 * 256 * 512 + 1536 + 512 + 2 * hidden) + (2 * 129280 // 32 + 1) * hidden
    routers = 58 * (256 * hidden + 256) * 4
    held = R1.weight_bytes_per_rank(mesh, "bfloat16", keeps_fp8=True)
    assert held == 2 * (cut + others) + narrow + routers


def test_checkpoints_that_are_not_fp8_are_not_kept_in_it():
    for mesh in (Mesh(), Mesh(dp=2, expert_parallel=True)):
        kept = MIXTRAL.weight_bytes_per_rank(mesh, "bfloat16", keeps_fp8=True)
        assert kept == MIXTRAL.weight_bytes_per_rank(mesh, "bfloat16")


@pytest.mark.parametrize("keeps_fp8", [False, True])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=8), Mesh(dp=8, expert_parallel=True), Mesh(tp=32)])
def test_bytes_of_an_expert_are_those_that_one_more_takes(mesh, keeps_fp8):
    more, spec = Mesh(dp=2, expert_parallel=True), R1
    found = expert_bytes(spec, mesh, "bfloat16", keeps_fp8)
    if keeps_fp8 and mesh.tp < 32:
        assert found == fp8(2 * 2048, 7168) + fp8(7168, 2048)
    else:
        assert found == 3 * 2048 * 7168 * 2
    with_more, without = (spec.weight_bytes_of_replica(more, "bfloat16", n, keeps_fp8) for n in (2, 0))
    assert with_more - without == 58 * 2 * expert_bytes(spec, more, "bfloat16", keeps_fp8)


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


def plan_bytes(parameter: Parameter) -> int:
    """Of FP8 with its scales, or of BF16, or of a router's FP32."""
    count = prod(parameter.shape)
    if parameter.fp8_block is None:
        return count * (4 if parameter.precision is Precision.FLOAT32 else 2)
    rows, columns = (-(-size // block) for size, block in zip(parameter.shape[-2:], parameter.fp8_block, strict=True))
    return count + 4 * prod(parameter.shape[:-2]) * rows * columns


@pytest.mark.parametrize("block", [(128, 128), (48, 96), (64, 32), (1, 2)], ids=str)
@pytest.mark.parametrize(
    ("spec", "mesh"),
    [
        pytest.param(spec, mesh, id=f"{name}-{mesh.name}")
        for name, spec in SPECS.items()
        for mesh in MESHES
        if spec.moe or not mesh.expert_parallel
    ],
)
def test_ranks_keep_in_fp8_what_the_budget_counts(spec, mesh, block):
    spec = replace(spec, fp8_block=block)
    per_stage = spec.weight_bytes_per_stage(mesh, "bfloat16", keeps_fp8=True)
    for rank in range(mesh.world_size):
        plan = shard_plan(spec, mesh, rank, keeps_fp8=True)
        assert sum(map(plan_bytes, plan.values())) == per_stage[mesh.coordinates(rank)[1]]
        for parameter in plan.values():
            for part in parameter.slices if parameter.fp8_block else ():
                size = parameter.fp8_block[part.dim]
                assert part.start % size == part.offset % size == 0
                assert part.stop % size == 0 or part.stop == part.shape[part.dim]


def test_a_router_must_have_room_for_its_choices():
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        MoESpec(num_experts=4, top_k=5, intermediate_size=8, sparse_layers=(0,))
