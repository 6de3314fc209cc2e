"""Every rank of every mesh holds its part of the checkpoint, and as much as placement says."""

from __future__ import annotations

from math import prod

import pytest
import torch

from ridgewalk.model.loader import load_parameters
from ridgewalk.model.sharding import shard_plan
from ridgewalk.model.tensor_rules import checkpoint_shapes
from ridgewalk.placement.expert_map import ExpertMap, balanced_expert_map
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.zoo.random_checkpoint import SHAPES, tensor_shapes
from tests.model.checkpoints import DENSE, FAMILIES, SPARSE
from tests.model.reassembly import reassemble, stored_tensors

PLAIN = (Mesh(), Mesh(tp=2), Mesh(tp=4), Mesh(tp=8), Mesh(pp=2), Mesh(tp=2, pp=2), Mesh(pp=4), Mesh(tp=2, pp=4))
EXPERT_PARALLEL = (
    Mesh(dp=2, expert_parallel=True),
    Mesh(tp=2, expert_parallel=True),
    Mesh(dp=4, expert_parallel=True),
    Mesh(tp=2, dp=2, expert_parallel=True),
    Mesh(tp=2, pp=2, expert_parallel=True),
    Mesh(tp=2, dp=2, pp=2, expert_parallel=True),
    Mesh(pp=4, dp=2, expert_parallel=True),
    Mesh(tp=8, expert_parallel=True),
)
REDUNDANT = 8
R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""The sizes of DeepSeek-R1."""


def cases(families, meshes):
    layers = {family: FAMILIES[family]().num_hidden_layers for family in families}
    fitting = [(family, mesh) for family in families for mesh in meshes if mesh.pp <= layers[family]]
    return [pytest.param(family, mesh, id=f"{family}-{mesh.name}") for family, mesh in fitting]


def load(
    folder, spec: ModelSpec, mesh: Mesh, expert_map: ExpertMap | None = None, dtype=torch.float32, keeps_fp8=False
):
    plans = [shard_plan(spec, mesh, rank, expert_map, keeps_fp8) for rank in range(mesh.world_size)]
    return [load_parameters(folder, spec, plan, dtype, torch.device("cpu")) for plan in plans]


def redundant_map(spec: ModelSpec, mesh: Mesh) -> ExpertMap:
    """8 more copies; the first expert of each layer is hot, the others cool down in order."""
    loads = [[1000, *range(70, 0, -10)] for _ in spec.moe.sparse_layers]
    return balanced_expert_map(spec.moe, mesh.dp * mesh.tp, REDUNDANT, loads)


def assert_reassembles(folder, mesh: Mesh, expert_map: ExpertMap | None = None) -> None:
    spec = ModelSpec.from_folder(folder)
    stored = stored_tensors(folder)
    found = reassemble(spec, mesh, expert_map, load(folder, spec, mesh, expert_map))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], values) for name, values in stored.items())


@pytest.mark.parametrize(("family", "mesh"), cases(SPARSE, PLAIN + EXPERT_PARALLEL))
def test_ranks_of_a_sparse_model_hold_the_checkpoint(checkpoint, family, mesh):
    assert_reassembles(checkpoint(family).folder, mesh)


@pytest.mark.parametrize(("family", "mesh"), cases(("llama-bias", "qwen2", "qwen3-4-layers", "llama-4-layers"), PLAIN))
def test_ranks_of_a_dense_model_hold_the_checkpoint(checkpoint, family, mesh):
    assert_reassembles(checkpoint(family).folder, mesh)


@pytest.mark.parametrize(("family", "mesh"), cases(("mixtral", "deepseek-v3-fp8"), EXPERT_PARALLEL))
def test_ranks_hold_the_copies_that_the_expert_map_gives_them(checkpoint, family, mesh):
    folder = checkpoint(family).folder
    assert_reassembles(folder, mesh, redundant_map(ModelSpec.from_folder(folder), mesh))


@pytest.mark.parametrize(("family", "mesh"), [*cases(DENSE, PLAIN), *cases(SPARSE, PLAIN + EXPERT_PARALLEL)])
def test_ranks_hold_as_much_as_placement_says(checkpoint, family, mesh):
    spec = ModelSpec.from_folder(checkpoint(family).folder)
    ranks = [shard_plan(spec, mesh, rank) for rank in range(mesh.world_size)]
    counts = [sum(prod(parameter.shape) for parameter in plan.values()) for plan in ranks]
    assert max(counts) == spec.num_parameters_per_rank(mesh)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "mesh"), cases(SPARSE, EXPERT_PARALLEL))
def test_ranks_with_copies_hold_as_many_bytes_as_placement_says(checkpoint, family, mesh, dtype):
    folder = checkpoint(family).folder
    spec = ModelSpec.from_folder(folder)
    ranks = load(folder, spec, mesh, redundant_map(spec, mesh), getattr(torch, dtype))
    held = [sum(tensor.nbytes for tensor in rank.values()) for rank in ranks]
    assert max(held) == spec.weight_bytes_per_rank(mesh, dtype, REDUNDANT)


@pytest.mark.parametrize("keeps_fp8", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "mesh"), cases([family for family in SPARSE if family.endswith("-fp8")], PLAIN + EXPERT_PARALLEL)
)
def test_ranks_hold_as_many_bytes_of_fp8_as_placement_says(checkpoint, family, mesh, dtype, keeps_fp8):
    folder = checkpoint(family).folder
    spec = ModelSpec.from_folder(folder)
    per_stage = spec.weight_bytes_per_stage(mesh, dtype, keeps_fp8=keeps_fp8)
    for rank, held in enumerate(load(folder, spec, mesh, None, getattr(torch, dtype), keeps_fp8)):
        assert sum(weight.nbytes for weight in held.values()) == per_stage[mesh.coordinates(rank)[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_name_the_tensors_that_transformers_saves(checkpoint, family):
    folder = checkpoint(family).folder
    stored = {name: tuple(values.shape) for name, values in stored_tensors(folder).items()}
    assert checkpoint_shapes(ModelSpec.from_folder(folder)) == stored


@pytest.mark.parametrize("like", SHAPES)
def test_rules_name_the_tensors_of_random_checkpoints(like):
    assert checkpoint_shapes(ModelSpec.from_config(SHAPES[like])) == dict(tensor_shapes(SHAPES[like]))


@pytest.mark.parametrize(
    "mesh", [Mesh(tp=8), Mesh(dp=8, expert_parallel=True), EXPERT_PARALLEL[5]], ids=lambda mesh: mesh.name
)
def test_ranks_of_r1_hold_as_much_as_placement_says(mesh):
    spec = ModelSpec.from_config(R1)
    assert sum(map(prod, checkpoint_shapes(spec).values())) == 671_026_419_200
    ranks = [shard_plan(spec, mesh, rank) for rank in range(mesh.world_size)]
    counts = [sum(prod(parameter.shape) for parameter in plan.values()) for plan in ranks]
    assert max(counts) == spec.num_parameters_per_rank(mesh)


def test_stages_hold_their_own_layers_and_ends(checkpoint):
    spec = ModelSpec.from_folder(checkpoint("llama-4-layers").folder)
    plans = [shard_plan(spec, Mesh(pp=4), rank) for rank in range(4)]
    layers = [sorted({name.split(".")[1] for name in plan if name.startswith("layers.")}) for plan in plans]
    assert layers == [["0"], ["1"], ["2"], ["3"]]
    ends = [{name for name in plan if not name.startswith("layers.")} for plan in plans]
    assert ends == [{"embedding"}, set(), set(), {"norm", "head"}]


def test_tied_embedding_is_on_the_first_and_last_stage(checkpoint):
    spec = ModelSpec.from_folder(checkpoint("qwen3-4-layers").folder)
    plans = [shard_plan(spec, Mesh(pp=4), rank) for rank in range(4)]
    assert [("embedding" in plan, "head" in plan, "norm" in plan) for plan in plans] == [
        (True, False, False),
        (False, False, False),
        (False, False, False),
        (True, False, True),
    ]


def test_kv_heads_are_repeated_beside_their_queries(checkpoint):
    folder = checkpoint("qwen3-yarn").folder
    ranks = load(folder, ModelSpec.from_folder(folder), Mesh(tp=4))
    key = stored_tensors(folder)["model.layers.0.self_attn.k_proj.weight"]
    qkv = [rank["layers.0.qkv"] for rank in ranks]
    assert all(torch.equal(qkv[rank][32:48], key[16 * (rank // 2) : 16 * (rank // 2 + 1)]) for rank in range(4))


def test_shapes_of_a_sparse_layer(checkpoint):
    """8 heads of 16 + 8 (values 12), latents of 20 and 24, 8 experts and a shared one of 24, hidden 64."""
    spec = ModelSpec.from_folder(checkpoint("deepseek-v3").folder)
    plan = shard_plan(spec, Mesh(tp=2, dp=2, expert_parallel=True), 3)
    prefix = "layers.1."
    shapes = {name.removeprefix(prefix): value.shape for name, value in plan.items() if name.startswith(prefix)}
    assert shapes == {
        "attention_norm": (64,),
        "q_a": (20, 64),
        "q_a_norm": (20,),
        "q_b": (96, 20),
        "kv_a": (32, 64),
        "kv_a_norm": (24,),
        "kv_b": (112, 24),
        "o": (64, 48),
        "mlp_norm": (64,),
        "router": (8, 64),
        "router_bias": (8,),
        "experts_gate_up": (2, 48, 64),
        "experts_down": (2, 64, 24),
        "shared_gate_up": (24, 64),
        "shared_down": (64, 12),
    }
