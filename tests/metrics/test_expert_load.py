"""Expert load, bubbles and routed tokens, as a replica exports them."""

from __future__ import annotations

import pytest

from ridgewalk.engine.step import RankTimings
from ridgewalk.metrics.expert_load import WINDOW_STEPS, ExpertLoad
from ridgewalk.placement.mesh import Mesh
from tests.metrics.builders import make_metrics, scrape, value

EP2 = Mesh(dp=2, expert_parallel=True)


def timings(rank: int, *layers: list[int]) -> RankTimings:
    return RankTimings(0, rank, 0.01, {}, [], expert_tokens=list(layers))


def test_imbalance_is_of_ranks_and_not_of_single_experts() -> None:
    """In the first layer both ranks compute 10 rows, however these fall on their experts; in the second 9 and 3."""
    load = ExpertLoad(EP2)
    load.on_timings([timings(0, [10, 0], [9, 0]), timings(1, [5, 5], [1, 2])])
    assert load.imbalance() == (1.5, 1.25)


def test_single_tokens_add_up_before_they_are_compared() -> None:
    """Every step sends its one token to one rank, but to each in turn."""
    load = ExpertLoad(EP2)
    for _ in range(8):
        load.on_timings([timings(0, [1]), timings(1, [0])])
        load.on_timings([timings(0, [0]), timings(1, [1])])
    assert load.imbalance() == (1, 1)


def test_steps_beyond_the_window_are_forgotten() -> None:
    load = ExpertLoad(EP2)
    for _ in range(5):
        load.on_timings([timings(0, [100]), timings(1, [0])])
    for _ in range(WINDOW_STEPS):
        load.on_timings([timings(0, [1]), timings(1, [1])])
    assert load.imbalance() == (1, 1)


def test_layers_of_all_stages_count_each_over_its_own_ranks() -> None:
    """PP2 x TP2: two sparse layers in the first stage, one in the second."""
    load = ExpertLoad(Mesh(pp=2, tp=2, expert_parallel=True))
    load.on_timings([timings(2, [0]), timings(3, [8]), timings(0, [4], [6]), timings(1, [4], [2])])
    assert load.imbalance() == (2, 1.5)


def test_layers_without_work_say_nothing() -> None:
    load = ExpertLoad(EP2)
    load.on_timings([timings(0, [0], [3]), timings(1, [0], [1])])
    assert load.imbalance() == (1.5, 1.5)
    idle = ExpertLoad(EP2)
    idle.on_timings([timings(0, [0]), timings(1, [0])])
    assert idle.imbalance() is None


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(expert_parallel=True)])
def test_ranks_that_share_no_experts_have_no_imbalance(mesh: Mesh) -> None:
    load = ExpertLoad(mesh)
    load.on_timings([timings(rank, [1, 2]) for rank in range(mesh.world_size)])
    assert load.imbalance() is None


def test_a_step_that_a_rank_has_not_reported_is_left_out() -> None:
    load = ExpertLoad(EP2)
    load.on_timings([timings(0, [5])])
    assert load.imbalance() is None


def test_an_expert_parallel_replica_exports_load_and_routing() -> None:
    metrics = make_metrics(dp=2, expert_parallel=True)
    for _ in range(2):
        metrics.on_timings(
            [
                RankTimings(0, 0, 0.01, {}, [], 0.0, [[3, 0], [1, 1]], 7, 700),
                RankTimings(0, 1, 0.01, {}, [], 0.0, [[0, 1], [2, 0]], 5, 500),
            ]
        )
    text = scrape(metrics)
    assert value(text, "expert_load_imbalance", scope="worst", model_name="m") == 1.5
    assert value(text, "expert_load_imbalance", scope="mean") == 1.25
    assert value(text, "routed_tokens_total", rank="0") == 14
    assert value(text, "routed_bytes_total", rank="1") == 1000
    assert value(text, "pipeline_bubble_seconds_total", rank="0") is None


def test_a_pipeline_exports_its_bubbles() -> None:
    metrics = make_metrics(pp=2)
    for _ in range(3):
        metrics.on_timings([RankTimings(0, rank, 0.01, {}, [], bubble_seconds=0.25 * (rank + 1)) for rank in range(2)])
    text = scrape(metrics)
    assert value(text, "pipeline_bubble_seconds_total", rank="0") == 0.75
    assert value(text, "pipeline_bubble_seconds_total", rank="1") == 1.5
    assert value(text, "routed_tokens_total") is None
    assert value(text, "expert_load_imbalance") is None


def test_a_plain_replica_exports_none_of_these() -> None:
    metrics = make_metrics(tp=2)
    metrics.on_timings([timings(0), timings(1)])
    text = scrape(metrics)
    names = ("expert_load_imbalance", "routed_tokens_total", "pipeline_bubble_seconds_total")
    assert [value(text, name) for name in names] == [None] * 3
