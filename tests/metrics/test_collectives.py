"""Wait and transfer."""

from __future__ import annotations

import pytest

from ridgewalk.engine.step import RankTimings
from ridgewalk.metrics.collectives import split_collectives
from ridgewalk.placement.mesh import Mesh
from tests.metrics.builders import make_metrics, make_timings, scrape, value


def test_a_late_rank_makes_the_others_wait() -> None:
    """Rank 1 enters 3 ms late: it needs 1 ms, rank 0 four. The other way round in the second call."""
    metrics = make_metrics(tp=2)
    metrics.on_timings(
        [
            make_timings(0, ("all_reduce", 0.004), ("all_reduce", 0.0005)),
            make_timings(1, ("all_reduce", 0.001), ("all_reduce", 0.0025)),
        ]
    )
    text = scrape(metrics)
    expected = {("wait", "0"): 0.003, ("wait", "1"): 0.002, ("transfer", "0"): 0.0015, ("transfer", "1"): 0.0015}
    for (phase, rank), seconds in expected.items():
        labels = {"op": "all_reduce", "phase": phase, "group": "tp", "rank": rank}
        assert value(text, "collective_seconds_sum", **labels) == pytest.approx(seconds)
        assert value(text, "collective_seconds_count", **labels) == 2
    assert value(text, "collective_seconds_bucket", phase="wait", rank="0", le="1e-05") == 1  # the one it was late for
    assert value(text, "collective_seconds_bucket", phase="wait", rank="0", le="0.002") == 1
    assert value(text, "collective_seconds_bucket", phase="wait", rank="0", le="0.005") == 2


def test_wait_and_transfer_of_a_rank_add_up_to_its_own_time() -> None:
    ranks = [make_timings(rank, ("all_reduce", 0.001 * (rank + 1)), ("all_gather", 0.002)) for rank in range(4)]
    seconds = split_collectives(ranks, Mesh(tp=4))
    for rank in range(4):
        total = sum(sum(values) for (_, _, _, who), values in seconds.items() if who == str(rank))
        assert total == pytest.approx(0.001 * (rank + 1) + 0.002)


def test_ops_are_kept_apart() -> None:
    ranks = [make_timings(r, ("all_reduce", 0.1), ("gather", 0.2)) for r in range(2)]
    seconds = split_collectives(ranks, Mesh(tp=2))
    assert seconds["all_reduce", "transfer", "tp", "1"] == [0.1]
    assert seconds["gather", "transfer", "tp", "1"] == [0.2]


def test_each_tensor_parallel_group_is_its_own() -> None:
    ranks = [make_timings(rank, ("all_reduce", seconds)) for rank, seconds in enumerate((0.1, 0.3, 0.7, 0.5))]
    seconds = split_collectives(ranks, Mesh(tp=2, pp=2))
    waits = [sum(seconds["all_reduce", "wait", "tp", str(rank)]) for rank in range(4)]
    assert waits == pytest.approx([0, 0.2, 0.2, 0])


@pytest.mark.parametrize(
    "ranks",
    [
        [make_timings(0, ("all_reduce", 0.1)), make_timings(1)],
        [make_timings(0, ("all_reduce", 0.1)), make_timings(1, ("all_gather", 0.1))],
        [make_timings(0, ("all_reduce", 0.1))],
    ],
)
def test_calls_that_cannot_be_matched_say_nothing(ranks: list) -> None:  # type: ignore[type-arg]
    assert split_collectives(ranks, Mesh(tp=2)) == {}


def merged(rank: int, *parts: RankTimings) -> RankTimings:
    """One step of a rank, from the calls of its groups."""
    return RankTimings(0, rank, 0.01, {}, [call for part in parts for call in part.collectives])


def test_ranks_that_share_experts_wait_for_each_other_over_attention_groups() -> None:
    """DP2 x TP2: two tp groups, one ep group of all four; the calls of both interleave."""
    ranks = [
        merged(
            rank,
            make_timings(rank, ("all_reduce", reduce)),
            make_timings(rank, ("dispatch", dispatch), ("combine", 0.1), group="ep"),
        )
        for rank, (reduce, dispatch) in enumerate([(0.2, 0.5), (0.3, 0.6), (0.7, 0.4), (0.6, 0.9)])
    ]
    seconds = split_collectives(ranks, Mesh(dp=2, tp=2, expert_parallel=True))
    assert [sum(seconds["all_reduce", "wait", "tp", str(rank)]) for rank in range(4)] == pytest.approx([0, 0.1, 0.1, 0])
    assert [sum(seconds["dispatch", "wait", "ep", str(r)]) for r in range(4)] == pytest.approx([0.1, 0.2, 0, 0.5])
    assert seconds["dispatch", "transfer", "ep", "3"] == [0.4]
    assert seconds["combine", "wait", "ep", "2"] == [0]


def test_stages_do_not_wait_in_each_others_collectives() -> None:
    ranks = [make_timings(rank, ("dispatch", seconds), group="ep") for rank, seconds in enumerate((0.1, 0.2, 0.8, 0.5))]
    seconds = split_collectives(ranks, Mesh(pp=2, tp=2, expert_parallel=True))
    assert [sum(seconds["dispatch", "wait", "ep", str(r)]) for r in range(4)] == pytest.approx([0, 0.1, 0.3, 0])


def test_of_a_link_the_receivers_time_is_transfer_and_the_senders_excess_wait() -> None:
    """PP3: the first sender waited for room, the second did not."""
    ranks = [
        make_timings(0, ("send", 0.5), group="pp"),
        make_timings(1, ("recv", 0.2), ("send", 0.1), group="pp"),
        make_timings(2, ("recv", 0.3), group="pp"),
    ]
    seconds = split_collectives(ranks, Mesh(pp=3))
    assert seconds == {
        ("send", "transfer", "pp", "0"): [0.2],
        ("send", "wait", "pp", "0"): [pytest.approx(0.3)],
        ("recv", "transfer", "pp", "1"): [0.2],
        ("recv", "wait", "pp", "1"): [0],
        ("send", "transfer", "pp", "1"): [0.1],
        ("send", "wait", "pp", "1"): [0],
        ("recv", "transfer", "pp", "2"): [0.3],
        ("recv", "wait", "pp", "2"): [0],
    }


def test_a_link_of_which_one_end_is_missing_says_nothing() -> None:
    assert split_collectives([make_timings(0, ("send", 0.5), group="pp")], Mesh(pp=2)) == {}
