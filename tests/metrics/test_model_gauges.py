"""Gauges of whole models, on paper."""

from __future__ import annotations

import dataclasses

import pytest

from ridgewalk.engine.stats import GroupStats
from ridgewalk.metrics.model_gauges import capacity_trap, stranded_ratio
from ridgewalk.metrics.replica_state import weight_bytes
from ridgewalk.metrics.snapshot import GroupState, ReplicaState
from ridgewalk.placement.model_spec import ModelSpec
from tests.metrics.builders import Clock, make_config, make_metrics, make_spec, make_stats, scrape, value
from tests.placement import hub_configs


def replica(available: int, starved: float | None = None, head: int = 0, seat: bool = True) -> ReplicaState:
    return ReplicaState("m", "DP2", "0", [GroupState(100, available, seat, starved)], head, 0, 0, False)


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ([replica(5, 0.0, 20), replica(60), replica(30)], 90 / 300),  # both others could admit it
        ([replica(5, 0.0, 40), replica(60), replica(30)], 60 / 300),  # only the second could
        ([replica(5, 0.0, 70), replica(60), replica(30)], 0),  # nobody could
        ([replica(5, 5.0, 20), replica(60)], 60 / 200),  # 5 s ago still counts
        ([replica(5, 5.1, 20), replica(60)], 0),
        ([replica(5, None, 20), replica(60)], 0),  # it waits for a seat or for budget, not for KV
        ([replica(5, 0.0, 20), replica(60, seat=False)], 0),
        ([replica(30, 1.0, 26), replica(25, 1.0, 28)], 30 / 200),  # starved both: the second's head fits in the first
        ([replica(5, 0.0, 20)], 0),  # no other group
        ([replica(5, 0.0, 0), replica(60)], 0),  # starved lately, but now nothing waits
        ([ReplicaState("m", "p", "0", [], 0, 0, 0, None)], None),  # no report yet
    ],
)
def test_stranded_ratio(replicas: list[ReplicaState], expected: float | None) -> None:
    assert stranded_ratio(replicas) == expected


def test_two_full_replicas_and_an_empty_one_over_the_wire() -> None:
    """The first throttles with a head of 40 blocks; 70 + 20 cached of 300 are free elsewhere, 80 in one group."""
    clock = Clock()
    recorders = [make_metrics(str(index), clock=clock, placement="DP3") for index in range(3)]
    recorders[0].on_stats(
        make_stats([GroupStats(95, 5, 0, 0, 3, throttled=True)], num_waiting=2, head_of_line_blocks=40)
    )
    recorders[1].on_stats(make_stats([GroupStats(90, 0, 10, 0, 3)]))
    recorders[2].on_stats(make_stats([GroupStats(20, 20, 60, 0, 1)]))
    assert value(scrape(*recorders), "kv_stranded_ratio", model_name="m") == pytest.approx(80 / 300)
    clock.now += 5.5
    assert value(scrape(*recorders), "kv_stranded_ratio", model_name="m") == 0


def test_what_running_sequences_are_predicted_to_need_is_not_stranded() -> None:
    starved, growing, steady = (make_metrics(str(index), placement="DP3") for index in range(3))
    starved.on_stats(make_stats([GroupStats(95, 0, 5, 0, 3, throttled=True)], num_waiting=1, head_of_line_blocks=20))
    growing.on_stats(make_stats([GroupStats(40, 0, 60, 0, 3, predicted_peak_blocks=90.0)]))
    steady.on_stats(make_stats([GroupStats(40, 0, 60, 0, 3, predicted_peak_blocks=70.0)]))
    assert value(scrape(starved, growing, steady), "kv_stranded_ratio", model_name="m") == pytest.approx(60 / 300)


def test_starving_between_two_reports_is_noticed() -> None:
    clock = Clock()
    first, second = make_metrics("0", clock=clock), make_metrics("1", clock=clock)
    first.on_stats(make_stats())
    second.on_stats(make_stats())
    clock.now += 1
    throttled_once = GroupStats(0, 0, 100, 0, 0, num_throttled=1)
    first.on_stats(make_stats([throttled_once], num_waiting=1, head_of_line_blocks=3))
    clock.now += 4
    first.on_stats(make_stats([throttled_once], num_waiting=1, head_of_line_blocks=3))
    assert value(scrape(first, second), "kv_stranded_ratio") == 0.5
    clock.now += 2
    assert value(scrape(first, second), "kv_stranded_ratio") == 0


def test_tensor_parallel_ranks_replicate_norms_alone() -> None:
    """tp=2, 2 KV heads: everything is split but the 5 norms of 8 floats."""
    spec = make_spec()
    held, unique = weight_bytes(make_config(2), spec)
    assert unique == spec.num_parameters * 4
    assert held - unique == 5 * 8 * 4


def test_repeated_kv_heads_are_copies_and_vocabulary_padding_is_not() -> None:
    """tp=4: norms three times more, and each of 2 KV heads (k and v, 2 layers, 8 x 2 floats) once more."""
    spec = make_spec(vocab_size=63)
    held, unique = weight_bytes(make_config(4), spec)
    assert held - unique == (3 * 5 * 8 + 2 * 2 * 2 * 8 * 2) * 4


def test_weights_that_a_mesh_has_to_widen_are_no_copies() -> None:
    """TP4 cuts experts of 768 into 192, which are not whole blocks of FP8: one rank alone keeps them."""
    spec = dataclasses.replace(ModelSpec.from_config(hub_configs.QWEN3_30B_A3B), fp8_block=(128, 128))
    held, unique = weight_bytes(make_config(4, dtype="bfloat16"), spec, keeps_fp8=True)
    assert held - unique < 0.01 * unique
    held, unique = weight_bytes(make_config(2, dtype="bfloat16"), spec, keeps_fp8=True)
    assert held - unique < 0.01 * unique
    assert unique < 1.1 * spec.num_parameters  # bytes: these are kept


def test_replicas_replicate_the_whole_model() -> None:
    unique = make_spec().num_parameters * 4
    assert value(scrape(make_metrics("0")), "kv_weight_replication_bytes") == 0
    text = scrape(*(make_metrics(str(index)) for index in range(3)))
    assert value(text, "kv_weight_replication_bytes", model_name="m") == 2 * unique
    mixed = scrape(make_metrics("0"), make_metrics("0", tp=2))  # a hybrid placement
    assert value(mixed, "kv_weight_replication_bytes") == unique + 5 * 8 * 4


@pytest.mark.parametrize(
    ("trapped", "expected"),
    [([False, True], 1), ([None, True], 1), ([False, False], 0), ([None, False], None), ([None], None)],
)
def test_capacity_trap_of_a_model(trapped: list[bool | None], expected: int | None) -> None:
    replicas = [ReplicaState("m", "p", str(index), [], 0, 0, 0, state) for index, state in enumerate(trapped)]
    assert capacity_trap(replicas) == expected
