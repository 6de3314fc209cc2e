"""Expert maps: complete, equal on every rank, and never worse balanced than the uniform one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ridgewalk.placement.expert_map import ExpertMap, balanced_expert_map, imbalance, uniform_expert_map
from ridgewalk.placement.moe_spec import MoESpec


def moe(num_experts, num_layers=1):
    return MoESpec(num_experts, min(2, num_experts), 8, tuple(range(num_layers)))


@st.composite
def cases(draw):
    """Ranks, redundant experts and loads that `validate_mesh` lets through."""
    ep = draw(st.integers(1, 8))
    num_experts = ep * draw(st.integers(1, 6))
    redundant = ep * draw(st.integers(0, num_experts * (ep - 1) // ep))
    load = st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts)
    return ep, num_experts, redundant, draw(st.lists(load, min_size=1, max_size=3))


@settings(deadline=None)
@given(cases())
@example((2, 4, 2, [[10, 3, 7, 6]]))  # nearly balanced: copies on other ranks could only make it worse
def test_a_balanced_map_is_complete_equal_and_no_worse_than_the_uniform_one(case):
    ep, num_experts, redundant, loads = case
    spec = moe(num_experts, len(loads))
    balanced, uniform = balanced_expert_map(spec, ep, redundant, loads), uniform_expert_map(spec, ep)
    before, after = imbalance(uniform, loads), imbalance(balanced, loads)
    for layer, ranks in enumerate(balanced.layers):
        assert len(ranks) == ep
        assert {len(slots) for slots in ranks} == {(num_experts + redundant) // ep}
        assert {expert for slots in ranks for expert in slots} == set(range(num_experts))
        assert after[layer] <= before[layer] + 1e-9
        assert after[layer] >= 1 - 1e-9
        apart = all(len(set(slots)) == len(slots) for slots in ranks)
        kept = all(set(slots) == set(home) for slots, home in zip(ranks, uniform.layers[layer], strict=True))
        assert apart or kept


@settings(deadline=None)
@given(cases())
def test_the_hottest_expert_has_most_copies(case):
    ep, num_experts, redundant, loads = case
    balanced = balanced_expert_map(moe(num_experts, len(loads)), ep, redundant, loads)
    for layer, load in enumerate(loads):
        ranks = balanced.layers[layer]
        if all(len(set(slots)) == len(slots) for slots in ranks):
            copies = Counter(expert for slots in ranks for expert in slots)
            assert copies[load.index(max(load))] == max(copies.values())


def test_uniform_map_is_contiguous_in_every_layer():
    expected = ((0, 1), (2, 3), (4, 5))
    assert uniform_expert_map(moe(6, 2), 3).layers == (expected, expected)


def test_without_redundancy_experts_are_packed_by_load():
    """Two hot experts on one rank are parted."""
    loads = [[10, 10, 1, 1]]
    balanced = balanced_expert_map(moe(4), 2, 0, loads)
    assert imbalance(uniform_expert_map(moe(4), 2), loads) == (pytest.approx(20 / 11),)
    assert imbalance(balanced, loads) == (1.0,)


def test_a_hot_expert_is_replicated_on_other_ranks():
    loads = [[90, 10, 10, 10]]
    balanced = balanced_expert_map(moe(4), 4, 4, loads)
    assert [rank for rank, _ in balanced.replicas(0, 0)] == [0, 1, 2, 3]
    assert max(imbalance(balanced, loads)) < 1.4 < max(imbalance(uniform_expert_map(moe(4), 4), loads))


def test_replicas_name_ranks_and_slots():
    expert_map = ExpertMap.from_lists([[[0, 1], [1, 2]], [[2, 1], [0, 1]]])
    assert expert_map.num_slots == 2
    assert expert_map.replicas(0, 1) == ((0, 1), (1, 0))
    assert expert_map.replicas(1, 0) == ((1, 0),)


def test_a_layer_without_load_counts_as_balanced():
    assert imbalance(uniform_expert_map(moe(4, 2), 2), [[0, 0, 0, 0], [1, 0, 0, 0]]) == (1.0, 2.0)
