"""Wait and transfer."""

from __future__ import annotations

import pytest

from ridgewalk.metrics.collectives import split_collectives
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
        labels = {"op": "all_reduce", "phase": phase, "rank": rank}
        assert value(text, "collective_seconds_sum", **labels) == pytest.approx(seconds)
        assert value(text, "collective_seconds_count", **labels) == 2
    assert value(text, "collective_seconds_bucket", phase="wait", rank="0", le="1e-05") == 1  # the one it was late for
    assert value(text, "collective_seconds_bucket", phase="wait", rank="0", le="0.002") == 1
    assert value(text, "collective_seconds_bucket", phase="wait", rank="0", le="0.005") == 2


def test_wait_and_transfer_of_a_rank_add_up_to_its_own_time() -> None:
    ranks = [make_timings(rank, ("all_reduce", 0.001 * (rank + 1)), ("all_gather", 0.002)) for rank in range(4)]
    seconds = split_collectives(ranks, 4)
    for rank in range(4):
        total = sum(sum(values) for (_, _, who), values in seconds.items() if who == str(rank))
        assert total == pytest.approx(0.001 * (rank + 1) + 0.002)


def test_ops_are_kept_apart() -> None:
    seconds = split_collectives([make_timings(r, ("all_reduce", 0.1), ("gather", 0.2)) for r in range(2)], 2)
    assert seconds["all_reduce", "transfer", "1"] == [0.1]
    assert seconds["gather", "transfer", "1"] == [0.2]


def test_each_tensor_parallel_group_is_its_own() -> None:
    ranks = [make_timings(rank, ("all_reduce", seconds)) for rank, seconds in enumerate((0.1, 0.3, 0.7, 0.5))]
    seconds = split_collectives(ranks, 2)
    waits = [sum(seconds["all_reduce", "wait", str(rank)]) for rank in range(4)]
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
    assert split_collectives(ranks, 2) == {}
