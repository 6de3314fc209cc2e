"""Figures that ranks measure, from real ranks: who waits, what moves, and who computes more than the others."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ridgewalk.engine.step import CollectiveTiming, RankTimings
from ridgewalk.kernels.torch_kernels import TorchKernels
from ridgewalk.model.dispatch import Dispatcher
from ridgewalk.parallel.process_groups import ProcessGroups
from ridgewalk.placement.mesh import Mesh
from tests.metrics.builders import make_metrics, scrape, value
from tests.parallel.ranks import run_ranks, run_threads

ROUNDS = 5
DELAY_S = 0.02
INJECTED_S = ROUNDS * DELAY_S
LATE = 1


def reduce_late(groups: ProcessGroups, rank: int) -> list[tuple[str, float, int, str]]:
    """One rank enters every all-reduce 20 ms after the other."""
    groups.tp.barrier()
    groups.start_timing()
    for _ in range(ROUNDS):
        if rank == LATE:
            time.sleep(DELAY_S)
        groups.tp.all_reduce(torch.ones(64))
    return [tuple(timed) for timed in groups.stop_timing()]


def test_a_late_rank_is_wait_on_its_peer_and_not_transfer(tmp_path: Path) -> None:
    """Of 5 x 20 ms at least half must be where it belongs, and less than half anywhere else, however busy the host."""
    results = run_ranks(reduce_late, Mesh(tp=2), tmp_path, shared=True)
    metrics = make_metrics(tp=2)
    metrics.on_timings([timings(rank, results[rank]) for rank in range(2)])
    text = scrape(metrics)

    def seconds(phase: str, rank: int) -> float:
        found = value(text, "collective_seconds_sum", op="all_reduce", phase=phase, group="tp", rank=str(rank))
        assert found is not None
        return found

    assert value(text, "collective_seconds_count", phase="wait", rank="0") == ROUNDS
    assert seconds("wait", 0) > INJECTED_S / 2
    assert seconds("wait", LATE) < INJECTED_S / 2
    assert seconds("transfer", 0) == seconds("transfer", LATE) < INJECTED_S / 2


def test_a_late_stage_is_bubble_of_the_next_and_neither_wait_nor_transfer(tmp_path: Path) -> None:
    def work(groups: ProcessGroups, rank: int) -> tuple[list[tuple[str, float, int, str]], float]:
        groups.start_timing()
        for _ in range(ROUNDS):
            if groups.next is not None:
                time.sleep(DELAY_S)
                groups.next.send(torch.ones(8))
            elif groups.previous is not None:
                groups.previous.recv((8,), torch.float32)
        timed = [tuple(each) for each in groups.stop_timing()]
        return timed, groups.previous.bubble_seconds if groups.previous else 0.0

    results = run_threads(work, Mesh(pp=2), tmp_path)
    metrics = make_metrics(pp=2)
    metrics.on_timings([timings(rank, *results[rank]) for rank in range(2)])  # type: ignore[misc]
    text = scrape(metrics)
    bubble = value(text, "pipeline_bubble_seconds_total", rank="1")
    assert bubble is not None
    assert bubble > INJECTED_S / 2
    assert value(text, "pipeline_bubble_seconds_total", rank="0") == 0
    for phase in ("wait", "transfer"):
        found = value(text, "collective_seconds_sum", op="recv", phase=phase, group="pp", rank="1")
        assert found is not None
        assert found < INJECTED_S / 2


ROUTES = {
    0: [[[0, 1], [0, 2], [3, 2]], [[0, 2]]],
    1: [[[0, 3], [2, 3]], [[1, 3]]],
}
"""By rank and layer: the two experts of each token. Experts 0 and 1 are on rank 0, 2 and 3 on rank 1."""


def route_by_hand(groups: ProcessGroups, rank: int) -> tuple[list[list[int]], int, int]:
    """Rows computed by layer and slot; rows that left, and their bytes."""
    rows, tokens, num_bytes = [], 0, 0
    for experts in ROUTES[rank]:
        dispatcher = Dispatcher([[0, 1], [2, 3]], 4, TorchKernels(), groups.ep, torch.device("cpu"))
        arrival = dispatcher.dispatch(torch.ones(len(experts), 8), torch.tensor(experts))
        rows.append(arrival.by_slot.starts.diff().tolist())
        tokens, num_bytes = tokens + dispatcher.routed_rows, num_bytes + dispatcher.routed_bytes
    return rows, tokens, num_bytes


def test_tokens_routed_by_hand_are_counted_where_they_leave_and_where_they_are_computed(tmp_path: Path) -> None:
    """First layer: rank 0 sends experts 2, 3, 2 away and rank 1 expert 0; rank 0 computes 0, 1, 0 and a 0 that came:
    4 rows, rank 1 has 6, so the busier has 6 / 5 of the mean. Second: each sends one and computes two. A row is 8
    values and its slot, 36 bytes."""
    mesh = {"dp": 2, "expert_parallel": True}
    results = run_threads(route_by_hand, Mesh(**mesh), tmp_path)  # type: ignore[arg-type]
    metrics = make_metrics(**mesh)  # type: ignore[arg-type]
    metrics.on_timings([RankTimings(0, rank, 0.01, {}, [], 0.0, *results[rank]) for rank in range(2)])  # type: ignore[misc]
    assert results[0][0] == [[3, 1], [1, 1]]  # type: ignore[index]
    text = scrape(metrics)
    assert [value(text, "routed_tokens_total", rank=str(rank)) for rank in range(2)] == [4, 2]
    assert [value(text, "routed_bytes_total", rank=str(rank)) for rank in range(2)] == [4 * 36, 2 * 36]
    assert value(text, "expert_load_imbalance", scope="worst") == 1.2
    assert value(text, "expert_load_imbalance", scope="mean") == 1.1


def timings(rank: int, calls: object, bubble_seconds: float = 0.0) -> RankTimings:
    assert isinstance(calls, list), calls  # a rank that raised returns its error's text
    return RankTimings(0, rank, 0.2, {}, [CollectiveTiming(*call) for call in calls], bubble_seconds)
