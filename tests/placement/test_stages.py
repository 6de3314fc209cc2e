"""stage_layers: contiguous stages, the costliest as cheap as can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.placement.stages import layer_costs, stage_layers
from tests.placement.hub_configs import DEEPSEEK_R1, LLAMA_31_8B, MIXTRAL_8X7B, QWEN3_0_6B, QWEN3_30B_A3B


def lengths(config, pp, **changes):
    return [len(layers) for layers in stage_layers(ModelSpec.from_config({**config, **changes}), pp)]


def stage_costs(spec, bounds):
    costs = layer_costs(spec)
    costs[-1] += spec.vocab_size * spec.hidden_size
    return [sum(costs[start:end]) for start, end in pairwise(bounds)]


def test_equal_layers_are_divided_equally():
    assert lengths(MIXTRAL_8X7B, 4) == [8, 8, 8, 8]
    assert lengths(QWEN3_30B_A3B, 8) == [6] * 8


def test_the_head_counts():
    """Its 525 M weights are worth two of Llama's layers of 218 M."""
    assert lengths(LLAMA_31_8B, 2) == [17, 15]
    assert lengths(LLAMA_31_8B, 4) == [8, 9, 9, 6]


def test_leading_dense_layers_are_cheap():
    assert lengths(DEEPSEEK_R1, 4) == [17, 15, 15, 14]
    assert lengths(DEEPSEEK_R1, 8)[0] == 10


def test_every_stage_has_a_layer_though_the_head_outweighs_all():
    assert lengths(QWEN3_0_6B, 3, num_hidden_layers=3) == [1, 1, 1]
    assert lengths(QWEN3_0_6B, 2, num_hidden_layers=4) == [3, 1]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="2 layers cannot be divided into 3 stages"):
        lengths(QWEN3_0_6B, 3, num_hidden_layers=2)


@settings(deadline=None)
@given(
    num_layers=st.integers(1, 9),
    pp=st.integers(1, 9),
    vocab_size=st.integers(1, 200_000),
    dense=st.sets(st.integers(0, 8)),
)
def test_stages_are_contiguous_and_the_costliest_is_least(num_layers, pp, vocab_size, dense):
    pp = min(pp, num_layers)
    changes = {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "mlp_only_layers": sorted(dense)}
    spec = ModelSpec.from_config({**QWEN3_30B_A3B, **changes})
    stages = stage_layers(spec, pp)
    assert [layer for layers in stages for layer in layers] == list(range(num_layers))
    assert len(stages) == pp
    assert all(stages)
    divisions = [(0, *inner, num_layers) for inner in combinations(range(1, num_layers), pp - 1)]
    best = min((max(costs), sum(cost**2 for cost in costs)) for costs in (stage_costs(spec, d) for d in divisions))
    chosen = stage_costs(spec, [0, *(layers.stop for layers in stages)])
    assert (max(chosen), sum(cost**2 for cost in chosen)) == best
