"""Collectives between real processes: right, equal on all ranks, and no hang when a peer dies."""

from __future__ import annotations

import glob
import os
import signal
import time

import pytest
import torch

from ridgewalk.parallel.communicator import CommunicationError
from ridgewalk.parallel.process_groups import ProcessGroups, make_process_groups
from ridgewalk.placement.mesh import Mesh
from tests.parallel.ranks import run_ranks, run_threads

SIZES = (1, 37, 5000, 700_000)  # the last one is larger than a slot of shared memory
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def payload(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank * 100 + count)).to(dtype)


def exercise(groups: ProcessGroups, rank: int) -> tuple[int, list]:
    """Every collective at every size; the process, and checksums that must agree between ranks."""
    tp = groups.tp
    digests = []
    ranks = range(tp.size)
    with torch.inference_mode():
        for dtype in DTYPES:
            for count in SIZES:
                parts = [payload(rank, count, dtype) for rank in ranks]
                reduced = tp.all_reduce(payload(tp.rank, count, dtype))
                expected = sum(part.float() for part in parts).to(dtype)
                torch.testing.assert_close(reduced, expected)
                digests.append(hash(reduced.view(torch.uint8).numpy().tobytes()))
                assert torch.equal(tp.all_gather(payload(tp.rank, count, dtype)), torch.stack(parts))
                root = count % tp.size
                gathered = tp.gather(payload(tp.rank, count, dtype), root)
                assert (gathered is None) == (tp.rank != root)
                assert gathered is None or torch.equal(gathered, torch.stack(parts))
                assert torch.equal(tp.broadcast(payload(tp.rank, count, dtype), root), parts[root])
        tokens = tp.broadcast(torch.arange(5) + 10 * tp.rank)
        assert tokens.tolist() == [0, 1, 2, 3, 4]
        groups.start_timing()
        tp.all_reduce(torch.ones(8))
        tp.gather(torch.ones(3, dtype=torch.bfloat16))
        timed = groups.stop_timing()
        tp.barrier()
    assert [(t.op, t.num_bytes, t.group) for t in timed] == [("all_reduce", 32, "tp"), ("gather", 6, "tp")]
    assert groups.seconds == sum(t.seconds for t in timed)
    assert all(t.seconds > 0 for t in timed)
    return os.getpid(), digests


@pytest.mark.parametrize(("size", "shared"), [(3, True), (2, False)])
def test_collectives(tmp_path, monkeypatch, size, shared):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    results = run_ranks(exercise, Mesh(tp=size), tmp_path, shared)
    assert all(isinstance(result, tuple) for result in results.values()), results
    assert len(results) == size
    assert len({tuple(digests) for _, digests in results.values()}) == 1  # bit by bit the same on all ranks
    assert not [path for pid, _ in results.values() for path in glob.glob(f"/dev/shm/ridgewalk-{pid}-*")]


def many_rounds(groups: ProcessGroups, rank: int) -> float:
    tp = groups.tp
    for index in range(1000):
        value = tp.all_reduce(torch.full((64,), float(tp.rank + index)))
        assert value[0] == sum(rank + index for rank in range(tp.size))
    return 1.0


def test_more_ranks_than_cores_make_progress(tmp_path):
    assert run_threads(many_rounds, Mesh(tp=4), tmp_path) == dict.fromkeys(range(4), 1.0)


def die_at_rank_1(groups: ProcessGroups, rank: int) -> str:
    tp = groups.tp
    tp.all_reduce(torch.ones(4))
    if tp.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(CommunicationError) as caught:
        tp.all_reduce(torch.ones(4))
    assert time.monotonic() - started < 5
    return str(caught.value)


def test_death_of_a_peer_raises_on_the_others(tmp_path):
    results = run_ranks(die_at_rank_1, Mesh(tp=3), tmp_path, True)
    # Rank 2 may hear of it from rank 0, which closes its end.
    assert set(results) == {0, 2}
    assert all("died" in results[rank] or "left the group" in results[rank] for rank in results), results
    assert any("the process of rank 1 died" in result for result in results.values())


def leave_at_rank_0(groups: ProcessGroups, rank: int) -> str:
    tp = groups.tp
    if tp.rank == 0:
        return "left"
    with pytest.raises(CommunicationError) as caught:
        tp.all_reduce(torch.ones(4))
    return str(caught.value)


def test_peer_that_leaves_wakes_the_others(tmp_path):
    results = run_threads(leave_at_rank_0, Mesh(tp=2), tmp_path)
    assert results[0] == "left"
    assert "left the group" in results[1] or "died" in results[1]


def test_group_of_one_moves_nothing():
    groups = make_process_groups(Mesh(), 0, "", torch.device("cpu"))
    x = torch.arange(6.0)
    assert groups.tp.all_reduce(x) is x
    assert torch.equal(groups.tp.all_gather(x), x[None])
    assert torch.equal(groups.tp.gather(x), x[None])
    groups.tp.barrier()
    groups.close()


@pytest.mark.parametrize("init", ["", "tcp://nowhere", "udp://a:1"])
def test_malformed_meeting_place_is_named(init):
    with pytest.raises(ValueError, match="init_method must be"):
        make_process_groups(Mesh(tp=2), 0, init, torch.device("cpu"))
