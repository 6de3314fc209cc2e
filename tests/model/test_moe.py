"""A sparse layer: one rank equals transformers' module, and every mesh of ranks equals one rank."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ridgewalk.kernels.build import load_library
from ridgewalk.kernels.cpu_kernels import CpuKernels
from ridgewalk.kernels.torch_kernels import TorchKernels
from ridgewalk.model.dispatch import replica_table
from ridgewalk.model.moe import MoE
from ridgewalk.model.phase_clock import PhaseClock
from ridgewalk.parallel.process_groups import ProcessGroups, make_process_groups
from ridgewalk.placement.expert_map import balanced_expert_map, uniform_expert_map
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.moe_spec import MoESpec
from tests.parallel.ranks import run_threads

CPU = torch.device("cpu")
HIDDEN, INNER, EXPERTS = 64, 48, 8
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
Parameters = dict[str, torch.Tensor]

SOFTMAX = MoESpec(EXPERTS, 3, INNER, (0,), names="mixtral")
SIGMOID = MoESpec(
    EXPERTS,
    3,
    INNER,
    (0,),
    shared_intermediate_size=32,
    scoring="sigmoid",
    routed_scaling_factor=2.5,
    num_groups=4,
    topk_groups=2,
    group_score="top2",
    correction_bias=True,
    names="deepseek",
)

MESHES = {
    "TP2": Mesh(tp=2),
    "EP1": Mesh(expert_parallel=True),
    "DP2 x EP2": Mesh(dp=2, expert_parallel=True),
    "TP2 x EP2": Mesh(tp=2, expert_parallel=True),
    "DP2 x TP2 x EP4": Mesh(dp=2, tp=2, expert_parallel=True),
    "DP4 x EP4": Mesh(dp=4, expert_parallel=True),
}


def make_parameters(moe: MoESpec, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parameters:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(dtype)

    parameters = {
        "router": normal(moe.num_experts, HIDDEN),
        "experts_gate_up": normal(moe.num_experts, 2 * moe.intermediate_size, HIDDEN),
        "experts_down": normal(moe.num_experts, HIDDEN, moe.intermediate_size),
    }
    if moe.correction_bias:
        parameters["router_bias"] = torch.randn(moe.num_experts, generator=g) * 0.2
    if moe.shared_intermediate_size:
        parameters["shared_gate_up"] = normal(2 * moe.shared_intermediate_size, HIDDEN)
        parameters["shared_down"] = normal(HIDDEN, moe.shared_intermediate_size)
    return parameters


def part(weight: torch.Tensor, axis: int, rank: int, size: int) -> torch.Tensor:
    return weight.chunk(size, dim=axis)[rank].contiguous()


def part_of_pair(gate_up: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return torch.cat([part(half, -2, rank, size) for half in gate_up.chunk(2, dim=-2)], dim=-2)


def shard(parameters: Parameters, mesh: Mesh, rank: int, slots: Sequence[Sequence[int]]) -> Parameters:
    """What `ridgewalk.model.sharding` gives a rank of a stage."""
    dp, _, tp = mesh.coordinates(rank)
    mine = dict(parameters)
    if mesh.expert_parallel:
        held = list(slots[dp * mesh.tp + tp])
        mine["experts_gate_up"] = parameters["experts_gate_up"][held]
        mine["experts_down"] = parameters["experts_down"][held]
    else:
        mine["experts_gate_up"] = part_of_pair(parameters["experts_gate_up"], tp, mesh.tp)
        mine["experts_down"] = part(parameters["experts_down"], -1, tp, mesh.tp)
    if "shared_down" in parameters:
        mine["shared_gate_up"] = part_of_pair(parameters["shared_gate_up"], tp, mesh.tp)
        mine["shared_down"] = part(parameters["shared_down"], -1, tp, mesh.tp)
    return mine


def make_layer(moe, parameters, kernels, groups: ProcessGroups, slots) -> MoE:
    spec = SimpleNamespace(moe=moe)
    return MoE(spec, dict(parameters), kernels, groups, slots, PhaseClock(groups, CPU))


def one_rank(moe: MoESpec, parameters: Parameters, kernels=None) -> MoE:
    groups = make_process_groups(Mesh(), 0, "", CPU)
    slots = [list(range(moe.num_experts))]
    return make_layer(moe, parameters, kernels or CpuKernels(load_library(), 1), groups, slots)


def run_mesh(moe, parameters, mesh, inputs, slots, folder, steps=1):
    """Output, expert tokens and routed rows and bytes of every rank; ``inputs`` by attention group."""

    def work(groups: ProcessGroups, rank: int):
        layer = make_layer(moe, shard(parameters, mesh, rank, slots), CpuKernels(load_library(), 1), groups, slots)
        for _ in range(steps):
            out = layer.forward(inputs[mesh.coordinates(rank)[0]].clone())
        return out, layer.expert_tokens, layer.routed_tokens, layer.routed_bytes

    results = run_threads(work, mesh, folder)
    assert len(results) == mesh.world_size
    for result in results.values():
        assert not isinstance(result, str), result
    return [results[rank] for rank in range(mesh.world_size)]


def slots_of(moe: MoESpec, mesh: Mesh) -> Sequence[Sequence[int]]:
    return uniform_expert_map(moe, mesh.dp * mesh.tp if mesh.expert_parallel else 1).layers[0]


def check_mesh(moe, mesh, tokens, folder, slots=None, parameters=None, dtype=torch.float32):
    """Every rank's output is that of one rank; returns what `run_mesh` does."""
    parameters = parameters or make_parameters(moe, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(count, HIDDEN, generator=g).to(dtype) for count in tokens]
    whole = one_rank(moe, parameters)
    results = run_mesh(moe, parameters, mesh, inputs, slots or slots_of(moe, mesh), folder)
    for rank, (out, *_) in enumerate(results):
        expected = whole.forward(inputs[mesh.coordinates(rank)[0]])
        torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if mesh.expert_parallel:
        assert sum(sum(counts) for _, counts, *_ in results) == sum(tokens) * moe.top_k
    return results


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("moe", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_every_mesh_computes_what_one_rank_does(mesh, moe, tmp_path):
    check_mesh(moe, MESHES[mesh], [11, 6, 1, 4][: MESHES[mesh].dp], tmp_path)


@pytest.mark.parametrize("mesh", ["TP2", "DP2 x TP2 x EP4"])
def test_bfloat16(mesh, tmp_path):
    check_mesh(SIGMOID, MESHES[mesh], [9, 30][: MESHES[mesh].dp], tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("tokens", [[0, 5], [1, 0], [0, 0], [1, 1]])
def test_groups_without_tokens_take_part(tokens, tmp_path):
    for mesh in ("DP2 x EP2", "DP2 x TP2 x EP4"):
        check_mesh(SIGMOID, MESHES[mesh], tokens, tmp_path)


def test_all_tokens_may_go_to_one_expert(tmp_path):
    moe = MoESpec(EXPERTS, 1, INNER, (0,))
    parameters = make_parameters(moe)
    parameters["router"] = torch.zeros_like(parameters["router"])  # equal scores go to expert 0
    results = check_mesh(moe, MESHES["DP4 x EP4"], [7, 0, 3, 5], tmp_path, parameters=parameters)
    assert [counts for _, counts, *_ in results] == [[15, 0], [0, 0], [0, 0], [0, 0]]
    row = (HIDDEN + 1) * 4
    assert [tuple(sent) for _, _, *sent in results] == [(0, 0), (0, 0), (3, 3 * row), (5, 5 * row)]


@pytest.mark.parametrize("mesh", ["DP2 x EP2", "TP2 x EP2", "DP2 x TP2 x EP4"])
def test_redundant_experts_change_no_result(mesh, tmp_path):
    mesh = MESHES[mesh]
    slots = balanced_expert_map(SIGMOID, mesh.dp * mesh.tp, 8, [[50, 1, 2, 40, 3, 1, 9, 30]]).layers[0]
    check_mesh(SIGMOID, mesh, [13, 8][: mesh.dp], tmp_path, slots=slots)


def test_a_replica_at_hand_keeps_rows_at_home(tmp_path):
    slots = [tuple(range(EXPERTS))] * 2  # everything is everywhere
    results = check_mesh(SOFTMAX, MESHES["DP2 x EP2"], [9, 4], tmp_path, slots=slots)
    assert [sent for *_, sent, _ in results] == [0, 0]
    assert [sum(counts) for _, counts, *_ in results] == [27, 12]


def test_replicas_elsewhere_take_turns():
    slots = [(0, 1), (2, 3), (0, 2), (0, 1)]
    assert replica_table(slots, 4, rank=1).tolist() == [
        [0, 4, 6, 0, 4, 6],
        [1, 7, 1, 7, 1, 7],
        [2, 2, 2, 2, 2, 2],
        [3, 3, 3, 3, 3, 3],
    ]
    assert replica_table(slots, 4, rank=3).tolist() == [[6, 6], [7, 7], [2, 5], [3, 3]]
    with pytest.raises(ValueError, match="no slot for expert 4"):
        replica_table(slots, 5, rank=0)


@pytest.mark.parametrize(
    ("copies", "turns", "unfair"),
    [
        ((2, 3, 1), 6, 0),
        ((4, 4, 2), 4, 0),
        ((1, 1, 1), 1, 0),
        ((3, 5, 8), 120, 0),
        ((7, 8, 9), 120, 1),
        ((130, 1, 2), 130, 1),
    ],
)
def test_copies_share_equally(copies, turns, unfair):
    """Seen from a rank that holds none of them."""
    slots = [(3,), *((expert,) for expert, count in enumerate(copies) for _ in range(count))]
    table = replica_table(slots, 4, rank=0)
    assert table.shape == (4, turns)
    for expert, count in enumerate(copies):
        _, shares = table[expert].unique(return_counts=True)
        assert len(shares) == count
        assert shares.max() - shares.min() <= unfair


def test_one_rank_takes_any_order_of_slots():
    parameters = make_parameters(SOFTMAX)
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    groups = make_process_groups(Mesh(), 0, "", CPU)
    moved = shard(parameters, Mesh(expert_parallel=True), 0, [order])
    x = torch.randn(10, HIDDEN)
    expected = one_rank(SOFTMAX, parameters).forward(x)
    layer = make_layer(SOFTMAX, moved, TorchKernels(), groups, [order])
    torch.testing.assert_close(layer.forward(x), expected, rtol=1e-5, atol=1e-5)
    assert sum(layer.expert_tokens) == 30


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.lists(st.integers(0, 20), min_size=4, max_size=4),
    mesh=st.sampled_from(["DP2 x EP2", "DP2 x TP2 x EP4", "DP4 x EP4"]),
    redundant=st.sampled_from([0, 4, 8]),
    loads=st.lists(st.integers(0, 100), min_size=EXPERTS, max_size=EXPERTS),
)
def test_any_load_and_map(tmp_path, tokens, mesh, redundant, loads):
    mesh = MESHES[mesh]
    slots = balanced_expert_map(SIGMOID, mesh.dp * mesh.tp, redundant, [loads]).layers[0]
    check_mesh(SIGMOID, mesh, tokens[: mesh.dp], tmp_path, slots=slots)


def test_phases_of_a_measured_step():
    groups = make_process_groups(Mesh(), 0, "", CPU)
    clock = PhaseClock(groups, CPU)
    spec = SimpleNamespace(moe=SIGMOID)
    layer = MoE(spec, make_parameters(SIGMOID), TorchKernels(), groups, [range(EXPERTS)], clock)
    clock.start()
    layer.forward(torch.randn(3, HIDDEN))
    clock.stop()
    assert set(clock.phases) == {"router", "experts", "mlp"}


def mixtral():
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    return MixtralSparseMoeBlock(config), MoESpec(EXPERTS, 2, INNER, (0,), names="mixtral")


def qwen3_moe():
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=3)
    return Qwen3MoeSparseMoeBlock(config), MoESpec(EXPERTS, 3, INNER, (0,), norm_topk_prob=False, names="qwen3_moe")


DEEPSEEK = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}


def deepseek_v2():
    config = DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy", mlp_bias=False)
    spec = MoESpec(
        EXPERTS,
        3,
        INNER,
        (0,),
        shared_intermediate_size=2 * INNER,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
        num_groups=4,
        topk_groups=2,
        names="deepseek",
    )
    return DeepseekV2Moe(config), spec


def deepseek_v3():
    spec = MoESpec(**{**vars(SIGMOID), "shared_intermediate_size": 2 * INNER})
    return DeepseekV3MoE(DeepseekV3Config(**DEEPSEEK)), spec


def parameters_of(module: torch.nn.Module) -> Parameters:
    """By our names, of a transformers module with random weights."""
    g = torch.Generator().manual_seed(3)
    state = module.state_dict()
    for name, tensor in state.items():
        tensor.copy_(
            torch.randn(tensor.shape, generator=g) * (0.2 if name.endswith("bias") else tensor.shape[-1] ** -0.5)
        )
    names = {
        "gate.weight": "router",
        "gate.e_score_correction_bias": "router_bias",
        "experts.gate_up_proj": "experts_gate_up",
        "experts.down_proj": "experts_down",
        "shared_experts.down_proj.weight": "shared_down",
    }
    parameters = {ours: state[theirs].clone() for theirs, ours in names.items() if theirs in state}
    if "shared_experts.gate_proj.weight" in state:
        halves = [state[f"shared_experts.{half}_proj.weight"] for half in ("gate", "up")]
        parameters["shared_gate_up"] = torch.cat(halves)
    return parameters


@pytest.mark.parametrize("family", [mixtral, qwen3_moe, deepseek_v2, deepseek_v3])
@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_one_rank_computes_what_transformers_does(family, kernels):
    module, moe = family()
    layer = one_rank(moe, parameters_of(module), TorchKernels() if kernels == "torch" else None)
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = module(x[None])[0]
    torch.testing.assert_close(layer.forward(x), expected, rtol=1e-5, atol=1e-5)
