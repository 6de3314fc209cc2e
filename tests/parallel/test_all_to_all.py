"""All-to-all: what comes is what a plain model says, over shared memory and gloo, and a dead rank is named."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ridgewalk.parallel.communicator import CommunicationError
from ridgewalk.parallel.process_groups import ProcessGroups, make_process_groups
from ridgewalk.placement.mesh import Mesh
from tests.parallel.ranks import run_ranks, run_threads

SIZE = 3
MESH = Mesh(dp=SIZE, expert_parallel=True)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
Counts = list[list[int]]  # rows by source and destination


def part(source: int, destination: int, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The rows from one rank to another, all different."""
    first = torch.arange(count, dtype=torch.int64)[:, None] + 10 * (SIZE * source + destination)
    return (first + torch.arange(width)).to(dtype)


def expected(counts: Counts, rank: int, width: int, dtype: torch.dtype) -> list[list[float]]:
    rows = []
    for source in range(len(counts)):
        rows += part(source, rank, counts[source][rank], width, dtype).tolist()
    return rows


def exchange_and_check(groups: ProcessGroups, counts: Counts, width: int, dtype: torch.dtype) -> None:
    rank, size = groups.ep.rank, groups.ep.size
    rows = torch.cat([part(rank, to, counts[rank][to], width, dtype) for to in range(size)])
    arrived, received = groups.ep.all_to_all(rows, torch.tensor(counts[rank]), "dispatch")
    assert received.tolist() == [counts[source][rank] for source in range(size)]
    assert arrived.dtype == dtype
    assert arrived.shape[1] == width
    assert arrived.tolist() == expected(counts, rank, width, dtype)


cells = st.integers(0, 9) | st.just(0)
matrices = st.lists(st.lists(cells, min_size=SIZE, max_size=SIZE), min_size=SIZE, max_size=SIZE)
exchanges = st.tuples(matrices, st.sampled_from((1, 3, 64, 40_000)), st.sampled_from(DTYPES))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(exchanges, min_size=1, max_size=4))
def test_what_comes_is_what_was_sent(tmp_path, plan):
    """Rows of 40,000 FP32 make up to three slots of what a rank sends: it goes in rounds."""

    def work(groups: ProcessGroups, rank: int) -> str:
        for counts, width, dtype in plan:
            exchange_and_check(groups, counts, width, dtype)
        return "done"

    assert run_threads(work, MESH, tmp_path) == dict.fromkeys(range(SIZE), "done")


UNEVEN = [
    ([[2, 0, 5], [0, 0, 0], [1, 7, 3]], 17, torch.bfloat16),
    ([[0, 0, 0], [0, 0, 0], [0, 0, 0]], 8, torch.float32),
    ([[0, 9, 0], [0, 0, 0], [0, 0, 0]], 300_000, torch.float32),  # ten slots from one rank to another
    ([[3, 3, 3], [40, 1, 0], [0, 0, 12]], 5000, torch.bfloat16),
    ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], 4, torch.uint8),
]


def uneven(groups: ProcessGroups, rank: int) -> str:
    for counts, width, dtype in UNEVEN * 2:
        exchange_and_check(groups, counts, width, dtype)
        total = groups.ep.all_reduce(torch.ones(3))  # other operations may follow
        assert total.tolist() == [3.0] * 3
    return "done"


@pytest.mark.parametrize("shared", [True, False])
def test_between_processes(tmp_path, shared):
    assert run_ranks(uneven, MESH, tmp_path, shared) == dict.fromkeys(range(SIZE), "done")


def test_a_slot_that_is_exactly_full_and_one_more_byte(tmp_path):
    def work(groups: ProcessGroups, rank: int) -> str:
        for spare in (-1, 0, 1):
            count = (1 << 20) - 128 + spare  # a slot less its header, in rows of a byte
            rows = torch.arange(count, dtype=torch.int64).to(torch.uint8)[:, None]
            counts = torch.tensor([0, count] if rank == 0 else [count, 0])
            arrived, _ = groups.ep.all_to_all(rows, counts, "combine")
            assert torch.equal(arrived, rows)
        return "done"

    results = run_threads(work, Mesh(dp=2, expert_parallel=True), tmp_path)
    assert results == dict.fromkeys(range(2), "done")


@pytest.mark.parametrize("shared", [True, False])
def test_counts_that_do_not_add_up_are_refused_before_anything_moves(tmp_path, shared):
    def work(groups: ProcessGroups, rank: int) -> str:
        for counts in ([1, 0, 0], [4, -2, 0]):
            with pytest.raises(ValueError, match="2 rows, but the counts by destination"):
                groups.ep.all_to_all(torch.ones(2, 4), torch.tensor(counts), "dispatch")
        exchange_and_check(groups, UNEVEN[0][0], 3, torch.float32)
        return "done"

    assert run_threads(work, MESH, tmp_path, shared) == dict.fromkeys(range(SIZE), "done")


@pytest.mark.parametrize(
    "counts", [torch.ones(3, dtype=torch.int32), torch.ones(2, dtype=torch.int64), torch.ones(3, 3).long()[:, 0]]
)
def test_counts_of_another_kind_are_refused(tmp_path, counts):
    def work(groups: ProcessGroups, rank: int) -> str:
        with pytest.raises(ValueError, match="counts must be 3 contiguous int64"):
            groups.ep.all_to_all(torch.ones(3, 4), counts, "dispatch")
        return "refused"

    assert run_threads(work, MESH, tmp_path) == dict.fromkeys(range(SIZE), "refused")


def test_rows_of_different_width_are_an_error_on_every_rank(tmp_path):
    def work(groups: ProcessGroups, rank: int) -> str:
        with pytest.raises(CommunicationError, match="another size"):
            groups.ep.all_to_all(torch.ones(3, 4 + (rank == 1)), torch.ones(3, dtype=torch.int64), "dispatch")
        return "told"

    assert run_threads(work, MESH, tmp_path) == dict.fromkeys(range(SIZE), "told")


def test_alone_nothing_moves():
    groups = make_process_groups(Mesh(expert_parallel=True), 0, "", torch.device("cpu"))
    rows, counts = torch.ones(5, 2), torch.tensor([5])
    groups.start_timing()
    arrived, received = groups.ep.all_to_all(rows, counts, "dispatch")
    assert arrived is rows
    assert received is counts
    assert groups.stop_timing() == []


def exchange_until_a_peer_dies(groups: ProcessGroups, rank: int) -> str:
    """Rank 1 is killed by another of its threads, while it is inside some all-to-all of several rounds."""
    begun = threading.Event()

    def kill() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        threading.Thread(target=kill, daemon=True).start()
    rows, counts = torch.ones(30, 100_000), torch.full((SIZE,), 10, dtype=torch.int64)
    try:
        while True:
            groups.ep.all_to_all(rows, counts, "dispatch")
            begun.set()
    except CommunicationError as error:
        return str(error)


@pytest.mark.parametrize("shared", [True, False])
def test_a_rank_killed_within_an_all_to_all_is_named(tmp_path, shared):
    results = run_ranks(exchange_until_a_peer_dies, MESH, tmp_path, shared)
    assert set(results) == {0, 2}
    # One of them may hear of it from the other, which closes its end.
    assert all("died" in str(result) or "left the group" in str(result) for result in results.values()), results
    assert any("the process of rank 1 died" in str(result) for result in results.values()), results


def late_rank(groups: ProcessGroups, rank: int) -> str:
    if rank == 1:
        return "never came"
    with pytest.raises(CommunicationError) as caught:
        groups.ep.all_to_all(torch.ones(3, 1), torch.ones(3, dtype=torch.int64), "dispatch")
    return str(caught.value)


def test_a_rank_that_leaves_wakes_the_others(tmp_path):
    results = run_threads(late_rank, MESH, tmp_path)
    assert "left the group" in str(results[0])
    assert "left the group" in str(results[2])
