"""Routing and experts: the C++ kernels against the torch reference, and the reference against transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from ridgewalk.kernels.build import load_library
from ridgewalk.kernels.cpu_kernels import CpuKernels
from ridgewalk.kernels.expert_kernels import RouterRules
from ridgewalk.kernels.torch_experts import grouped_linear
from ridgewalk.kernels.torch_kernels import TorchKernels

REFERENCE = TorchKernels()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HIDDEN = 32
QUICK = settings(max_examples=40, deadline=None)

dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def cpu():
    library = load_library()
    assert library is not None, "g++ is needed for these tests"
    return CpuKernels(library, 2)


@pytest.fixture(params=["cpu", "torch"])
def kernels(request):
    return request.getfixturevalue("cpu") if request.param == "cpu" else REFERENCE


def normal(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def mixtral():
    config = MixtralConfig(hidden_size=HIDDEN, num_local_experts=8, num_experts_per_tok=2)
    return MixtralTopKRouter(config), RouterRules(2, normalize=True)


def qwen3_moe(norm):
    config = Qwen3MoeConfig(hidden_size=HIDDEN, num_experts=20, num_experts_per_tok=3, norm_topk_prob=norm)
    return Qwen3MoeTopKRouter(config), RouterRules(3, normalize=norm)


def deepseek_v2(method):
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        n_routed_experts=40,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        topk_method=method,
        routed_scaling_factor=16.0,
    )
    groups = {"num_groups": 8, "topk_groups": 3} if method == "group_limited_greedy" else {}
    return DeepseekV2TopkRouter(config), RouterRules(6, scale=16.0, **groups)


def deepseek_v3(norm, groups=8, topk_groups=4):
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=64,
        num_experts_per_tok=8,
        n_group=groups,
        topk_group=topk_groups,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    return DeepseekV3TopkRouter(config), RouterRules(8, "sigmoid", groups, topk_groups, "top2", norm, 2.5)


FAMILIES = {
    "mixtral": mixtral,
    "qwen3_moe": lambda: qwen3_moe(False),
    "qwen3_moe normalised": lambda: qwen3_moe(True),
    "deepseek_v2 greedy": lambda: deepseek_v2("greedy"),
    "deepseek_v2 in groups": lambda: deepseek_v2("group_limited_greedy"),
    "deepseek_v3": lambda: deepseek_v3(True),
    "deepseek_v3 unnormalised": lambda: deepseek_v3(False),
    "deepseek_v3 one group": lambda: deepseek_v3(True, 1, 1),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 300])
def test_routes_as_transformers(kernels, family, tokens):
    g = torch.Generator().manual_seed(tokens)
    module, rules = FAMILIES[family]()
    with torch.no_grad():
        module.weight.copy_(normal(g, *module.weight.shape))
    bias = getattr(module, "e_score_correction_bias", None)
    if bias is not None:
        bias.copy_(normal(g, *bias.shape, scale=0.3))
    with torch.no_grad():
        logits, expected_weights, expected = module(normal(g, tokens, HIDDEN))
    weights, experts = kernels.route(logits, rules, bias)
    # transformers leaves the order of a token's experts open.
    expected, order = expected.sort(dim=-1)
    experts, ours = experts.sort(dim=-1)
    assert torch.equal(experts, expected)
    torch.testing.assert_close(weights.gather(1, ours), expected_weights.gather(1, order), rtol=1e-5, atol=1e-7)


@QUICK
@given(
    tokens=st.integers(0, 50),
    size=st.integers(2, 9),
    groups=st.sampled_from([(1, 1), (4, 1), (4, 3), (17, 5)]),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    group_score=st.sampled_from(["max", "top2"]),
    normalize=st.booleans(),
    bias=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_route(cpu, tokens, size, groups, scoring, group_score, normalize, bias, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    num_experts = size * groups[0]
    logits = normal(g, tokens, num_experts, dtype=dtype)
    added = normal(g, num_experts, scale=0.2) if bias else None
    top_k = min(4, size * groups[1])
    rules = RouterRules(top_k, scoring, *groups, group_score, normalize, 2.0)
    weights, experts = cpu.route(logits, rules, added)
    expected_weights, expected = REFERENCE.route(logits, rules, added)
    # The last bit of a score may differ: compare what was chosen by its score.
    torch.testing.assert_close(weights.sort(dim=-1).values, expected_weights.sort(dim=-1).values, rtol=1e-5, atol=1e-6)
    if dtype == torch.float32:
        assert torch.equal(experts, expected)


def test_equal_scores_go_to_the_lower_expert(kernels):
    logits = torch.zeros(3, 24)
    logits[1, 20] = logits[1, 7] = 1.0
    for scoring in ("softmax", "sigmoid"):
        _, experts = kernels.route(logits, RouterRules(3, scoring))
        assert experts.tolist() == [[0, 1, 2], [7, 20, 0], [0, 1, 2]]
        _, experts = kernels.route(logits, RouterRules(3, scoring, 4, 2, "top2"), torch.zeros(24))
        assert experts.tolist() == [[0, 1, 2], [7, 20, 6], [0, 1, 2]]


@QUICK
@given(groups=st.lists(st.integers(0, 6), max_size=100), spare=st.integers(0, 3))
def test_rows_of_a_group_keep_their_order(cpu, groups, spare):
    keys = torch.tensor(groups, dtype=torch.int64)
    for kernels in (cpu, REFERENCE):
        found = kernels.group_rows(keys, 7 + spare)
        assert found.order.tolist() == sorted(range(len(groups)), key=lambda row: groups[row])
        assert found.order[found.position].tolist() == list(range(len(groups)))
        assert found.starts.tolist() == [sum(key < group for key in groups) for group in range(8 + spare)]


@QUICK
@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 4),
    shape=st.sampled_from([(1, 3), (2, 2), (4, 5), (3, 1)]),
    turns=st.integers(1, 3),
    turn=st.integers(0, 5),
    width=st.integers(1, 70),
    dtype=dtypes,
    seed=seeds,
)
def test_rows_travel_with_their_slots(cpu, tokens, top_k, shape, turns, turn, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    ranks, slots = shape
    table = torch.randint(0, ranks * slots, (6, turns), generator=g)
    experts, x = torch.randint(0, 6, (tokens, top_k), generator=g), normal(g, tokens, width, dtype=dtype)
    places = [
        int(table[expert, (token + turn) % turns]) for token, row in enumerate(experts.tolist()) for expert in row
    ]
    order = sorted(range(len(places)), key=lambda pair: places[pair])
    for kernels in (cpu, REFERENCE):
        plan = kernels.plan_send(experts, table, turn, ranks, slots)
        assert plan.order.tolist() == order
        assert plan.order[plan.position].tolist() == list(range(len(order)))
        assert plan.tags.tolist() == [places[pair] % slots for pair in order]
        assert plan.counts.tolist() == [sum(place // slots == rank for place in places) for rank in range(ranks)]
        tagged = kernels.tag_rows(x, plan, top_k)
        assert torch.equal(tagged[:, :-1], x[plan.order // top_k])
        arrived = kernels.group_tagged(tagged, slots)
        expected = REFERENCE.group_rows(plan.tags, slots)
        assert torch.equal(arrived.order, expected.order)
        assert torch.equal(arrived.position, expected.position)
        assert torch.equal(arrived.starts, expected.starts)


@QUICK
@given(
    tokens=st.integers(0, 40), top_k=st.integers(1, 6), width=st.integers(1, 90), placed=st.booleans(), dtype=dtypes,
    seed=seeds,
)  # fmt: skip
def test_weighted_sum(cpu, tokens, top_k, width, placed, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    rows, weights = normal(g, tokens * top_k, width, dtype=dtype), normal(g, tokens, top_k)
    position = torch.randperm(tokens * top_k, generator=g) if placed else None
    chosen = (rows if position is None else rows[position]).view(tokens, top_k, width).double()
    expected = (chosen * weights[:, :, None].double()).sum(dim=1)
    for kernels in (cpu, REFERENCE):
        actual = kernels.weighted_sum(rows, weights, position)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def experts_in_double(x, starts, gate_up, down):
    """One row at a time."""
    rows = []
    for slot, (begin, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        gate, up = (x[begin:end].double() @ gate_up[slot].double().T).chunk(2, dim=-1)
        rows.append((torch.nn.functional.silu(gate) * up) @ down[slot].double().T)
    return torch.cat(rows)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 12, 13, 30, 250, 500]), min_size=1, max_size=7),
    hidden=st.sampled_from([2, 8, 31, 32, 48, 100]),
    inner=st.sampled_from([2, 7, 32, 40, 96]),
    dtype=dtypes,
    seed=seeds,
)
@example(counts=[0, 1, 0], hidden=64, inner=32, dtype=torch.bfloat16, seed=0)
@example(counts=[0, 0], hidden=64, inner=32, dtype=torch.bfloat16, seed=0)
def test_expert_mlp(cpu, counts, hidden, inner, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    total, slots = sum(counts), len(counts)
    gate_up = normal(g, slots, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5)
    down = normal(g, slots, hidden, inner, dtype=dtype, scale=inner**-0.5)
    starts = torch.tensor([0, *counts]).cumsum(0)
    x = normal(g, total, hidden, dtype=dtype, scale=0.5)  # gates and ups are rounded: small ones, small errors
    expected = experts_in_double(x, starts, gate_up, down)
    for kernels in (cpu, REFERENCE):
        weights = kernels.pack_experts(gate_up, down)
        actual = kernels.expert_mlp(x, starts, weights)
        torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        # The same rows out of order, in a wider matrix.
        order = torch.randperm(total, generator=g)
        scattered = torch.full((total, hidden + 1), torch.nan, dtype=dtype)
        scattered[order, :-1] = x
        again = kernels.expert_mlp(scattered[:, :-1], starts, weights, order)
        torch.testing.assert_close(again[order], actual, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@QUICK
@given(tokens=st.integers(0, 30), copies=st.integers(1, 4), dtype=dtypes, seed=seeds)
def test_a_row_goes_to_several_experts_without_copies(cpu, tokens, copies, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    gate_up = normal(g, 5, 64, 48, dtype=dtype, scale=0.15)
    down = normal(g, 5, 48, 32, dtype=dtype, scale=0.2)
    x = normal(g, tokens, 48, dtype=dtype, scale=0.5)
    slots = torch.randint(0, 5, (tokens * copies,), generator=g)
    for kernels in (cpu, REFERENCE):
        groups, weights = kernels.group_rows(slots, 5), kernels.pack_experts(gate_up, down)
        actual = kernels.expert_mlp(x, groups.starts, weights, groups.order, copies)
        repeated = x.repeat_interleave(copies, dim=0)[groups.order]
        expected = experts_in_double(repeated, groups.starts, gate_up, down)
        torch.testing.assert_close(
            actual[groups.order].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def test_a_row_does_not_notice_the_others(cpu):
    g = torch.Generator().manual_seed(0)
    weights = cpu.pack_experts(normal(g, 3, 128, 96, dtype=torch.bfloat16), normal(g, 3, 96, 64, dtype=torch.bfloat16))
    x = normal(g, 90, 96, dtype=torch.bfloat16)
    together = cpu.expert_mlp(x, torch.tensor([0, 1, 40, 90]), weights)
    for row in (0, 1, 39, 40, 89):
        starts = torch.tensor([0, row < 1, row < 40, True]).int().cummax(0).values.long()
        assert torch.equal(cpu.expert_mlp(x[row : row + 1], starts, weights)[0], together[row])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [32, 33])
def test_grouped_linear_with_and_without_a_kernel_of_torch(dtype, width):
    g = torch.Generator().manual_seed(width)
    x, weight = normal(g, 20, width, dtype=dtype), normal(g, 3, 40, width, dtype=dtype)
    actual = grouped_linear(x, torch.tensor([0, 7, 7, 20]), weight)
    expected = torch.cat([x[:7].double() @ weight[0].double().T, x[7:].double() @ weight[2].double().T])
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_long_batches_go_through_in_blocks(monkeypatch):
    monkeypatch.setattr("ridgewalk.kernels.torch_experts.ROW_BLOCK", 16)
    g = torch.Generator().manual_seed(1)
    gate_up, down = normal(g, 3, 64, 48, scale=0.2), normal(g, 3, 48, 32, scale=0.2)
    x, starts = normal(g, 50, 48), torch.tensor([0, 10, 37, 50])
    actual = REFERENCE.expert_mlp(x, starts, REFERENCE.pack_experts(gate_up, down))
    torch.testing.assert_close(actual.double(), experts_in_double(x, starts, gate_up, down), rtol=2e-5, atol=2e-5)
