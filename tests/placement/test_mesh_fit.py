"""validate_mesh: what does not divide or fit is named, with what to change."""

from __future__ import annotations

import pytest

from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec, UnsupportedModelError, validate_mesh
from tests.placement.hub_configs import DEEPSEEK_R1, DEEPSEEK_V2_LITE, MIXTRAL_8X7B, QWEN3_0_6B, QWEN3_30B_A3B

DENSE = ModelSpec.from_config(QWEN3_0_6B)
MIXTRAL = ModelSpec.from_config(MIXTRAL_8X7B)
QWEN3_MOE = ModelSpec.from_config(QWEN3_30B_A3B)
V2_LITE = ModelSpec.from_config(DEEPSEEK_V2_LITE)
R1 = ModelSpec.from_config(DEEPSEEK_R1)


@pytest.mark.parametrize(
    ("spec", "mesh", "redundant"),
    [
        (DENSE, Mesh(tp=4, pp=4), 0),
        (DENSE, Mesh(tp=16), 0),
        (DENSE, Mesh(pp=28), 0),
        (MIXTRAL, Mesh(tp=4, pp=2), 0),
        (MIXTRAL, Mesh(dp=8, expert_parallel=True), 56),
        (MIXTRAL, Mesh(tp=2, pp=2, dp=2, expert_parallel=True), 0),
        (QWEN3_MOE, Mesh(tp=4, expert_parallel=True), 4),
        (QWEN3_MOE, Mesh(expert_parallel=True), 0),
        (V2_LITE, Mesh(tp=16, expert_parallel=True), 0),
        (R1, Mesh(tp=8), 0),
        (R1, Mesh(tp=2, dp=16, expert_parallel=True), 32),
        (R1, Mesh(tp=2, pp=4), 0),
    ],
)
def test_mesh_that_fits(spec, mesh, redundant):
    validate_mesh(spec, mesh, redundant)


@pytest.mark.parametrize(
    ("spec", "mesh", "redundant", "message"),
    [
        (DENSE, Mesh(tp=3), 0, r"\(-tp\) 3 does not divide the 16 attention heads; choose one of 1, 2, 4, 8, 16$"),
        (DENSE, Mesh(pp=29), 0, r"\(-pp\) 29 is more than the 28 layers; lower -pp"),
        (DENSE, Mesh(dp=2), 0, "dp=2.* needs an expert-parallel model; run 2 replicas of Qwen3ForCausalLM"),
        (DENSE, Mesh(expert_parallel=True), 0, "no experts to run expert-parallel; drop --enable-expert-parallel"),
        (DENSE, Mesh(), 2, "num_redundant_experts 2 needs expert parallelism"),
        (MIXTRAL, Mesh(dp=2), 0, "dp=2.* needs expert parallelism; add --enable-expert-parallel or run 2 replicas"),
        (MIXTRAL, Mesh(tp=2), 2, "num_redundant_experts 2 needs expert parallelism; set it to 0 or add"),
        (MIXTRAL, Mesh(dp=3, expert_parallel=True), 0, "8 experts .* over dp x tp = 3 ranks; .* among 1, 2, 4, 8$"),
        (MIXTRAL, Mesh(dp=4, expert_parallel=True), 2, "num_redundant_experts 2 must be a multiple of dp x tp = 4"),
        (MIXTRAL, Mesh(dp=2, expert_parallel=True), 10, "at most 8, which puts every expert on every rank"),
        (MIXTRAL, Mesh(dp=2, expert_parallel=True), -2, "num_redundant_experts -2"),
        (V2_LITE, Mesh(tp=3), 0, "16 attention heads"),
    ],
)
def test_mesh_that_does_not_fit_is_named(spec, mesh, redundant, message):
    with pytest.raises(UnsupportedModelError, match=message):
        validate_mesh(spec, mesh, redundant)


def test_kv_heads_and_tp_must_divide_one_another():
    spec = ModelSpec.from_config({**QWEN3_0_6B, "num_attention_heads": 12, "num_key_value_heads": 6})
    with pytest.raises(UnsupportedModelError, match="6 KV heads do not divide"):
        validate_mesh(spec, Mesh(tp=4))
    validate_mesh(spec, Mesh(tp=3))
    validate_mesh(spec, Mesh(tp=12))


def test_experts_are_sliced_only_without_expert_parallelism():
    spec = ModelSpec.from_config({**QWEN3_30B_A3B, "moe_intermediate_size": 770})
    with pytest.raises(UnsupportedModelError, match=r"experts' intermediate size 770; choose one of 1, 2$"):
        validate_mesh(spec, Mesh(tp=4))
    validate_mesh(spec, Mesh(tp=4, expert_parallel=True))


def test_shared_experts_are_sliced_always():
    spec = ModelSpec.from_config({**DEEPSEEK_V2_LITE, "moe_intermediate_size": 1409, "n_shared_experts": 1})
    with pytest.raises(UnsupportedModelError, match="shared experts' intermediate size 1409"):
        validate_mesh(spec, Mesh(tp=2, expert_parallel=True))


def test_intermediate_size_counts_only_where_layers_are_dense():
    validate_mesh(ModelSpec.from_config({**QWEN3_30B_A3B, "intermediate_size": 6145}), Mesh(tp=2))
    spec = ModelSpec.from_config({**QWEN3_30B_A3B, "intermediate_size": 6145, "mlp_only_layers": [0]})
    with pytest.raises(UnsupportedModelError, match="does not divide the intermediate size 6145"):
        validate_mesh(spec, Mesh(tp=2))
