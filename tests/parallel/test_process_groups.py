"""Which ranks form which group, over any mesh."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

from ridgewalk.parallel import connector, process_groups
from ridgewalk.parallel.communicator import CommunicationError
from ridgewalk.parallel.process_groups import ProcessGroups
from ridgewalk.parallel.roster import Member, share_memory
from ridgewalk.placement.mesh import Mesh
from tests.parallel.ranks import run_ranks, run_threads

HYBRID = Mesh(dp=2, pp=2, tp=2, expert_parallel=True)


def members(groups: ProcessGroups, rank: int) -> tuple[list[int], list[int], int | None]:
    """The ranks of this one's groups, and of its link to the stage before."""
    own = torch.tensor([rank])
    if groups.next:
        groups.next.send(own)
    previous = int(groups.previous.recv((1,), torch.int64)) if groups.previous else None
    tp, ep = (group.all_gather(own).flatten().tolist() for group in (groups.tp, groups.ep))
    assert (tp[groups.tp.rank], ep[groups.ep.rank]) == (rank, rank)
    assert (len(tp), len(ep)) == (groups.tp.size, groups.ep.size)
    return tp, ep, previous


def test_groups_of_a_hybrid_mesh(tmp_path):
    assert run_threads(members, HYBRID, tmp_path) == {
        0: ([0, 1], [0, 1, 2, 3], None),
        1: ([0, 1], [0, 1, 2, 3], None),
        2: ([2, 3], [0, 1, 2, 3], None),
        3: ([2, 3], [0, 1, 2, 3], None),
        4: ([4, 5], [4, 5, 6, 7], 0),
        5: ([4, 5], [4, 5, 6, 7], 1),
        6: ([6, 7], [4, 5, 6, 7], 2),
        7: ([6, 7], [4, 5, 6, 7], 3),
    }


def test_without_expert_parallelism_nobody_shares_experts(tmp_path):
    results = run_threads(members, Mesh(pp=2, tp=2), tmp_path)
    assert results == {0: ([0, 1], [0], None), 1: ([0, 1], [1], None), 2: ([2, 3], [2], 0), 3: ([2, 3], [3], 1)}


def steps(groups: ProcessGroups, rank: int) -> int:
    """What a decoder does, many times: attention summed over tp, experts over ep, then the next stage."""
    checked = 0
    for step in range(30):
        hidden = groups.previous.recv((5, 16), torch.float32) if groups.previous else torch.full((5, 16), float(step))
        for _ in range(3):
            total = groups.tp.all_reduce(hidden.clone())
            assert torch.equal(total, hidden * groups.tp.size)
            counts = torch.tensor([(step + source) % 3 for source in range(groups.ep.size)])
            rows = hidden[:1].expand(int(counts.sum()), 16)
            arrived, received = groups.ep.all_to_all(rows, counts, "dispatch")
            returned, back = groups.ep.all_to_all(arrived, received, "combine")
            assert torch.equal(back, counts)
            assert torch.equal(returned, rows)
            checked += 1
        if groups.next:
            groups.next.send(hidden + 1)
        else:
            assert torch.equal(hidden, torch.full((5, 16), float(step + (groups.previous is not None))))
    return checked


def test_calls_of_all_groups_interleave(tmp_path):
    assert run_threads(steps, HYBRID, tmp_path) == dict.fromkeys(range(8), 90)


def test_processes_of_a_small_hybrid(tmp_path):
    mesh = Mesh(pp=2, tp=2, expert_parallel=True)
    assert run_ranks(steps, mesh, tmp_path, True) == dict.fromkeys(range(4), 90)


def test_a_replica_over_two_hosts_shares_memory_within_each(tmp_path, monkeypatch):
    exchange = process_groups.exchange_members

    def two_hosts(*arguments) -> tuple[Member, ...]:
        """The stages are far apart."""
        return tuple(replace(member, host=f"host{rank // 2}") for rank, member in enumerate(exchange(*arguments)))

    monkeypatch.setattr(process_groups, "exchange_members", two_hosts)
    finished = threading.Barrier(4)

    def work(groups: ProcessGroups, rank: int) -> int:
        checked = steps(groups, rank)
        finished.wait(timeout=30)
        return checked

    assert run_threads(work, Mesh(pp=2, tp=2, expert_parallel=True), tmp_path) == dict.fromkeys(range(4), 90)


def test_without_room_for_segments_ranks_talk_through_gloo(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(connector, "create_segment", lambda num_bytes: "")
    finished = threading.Barrier(2)

    def work(groups: ProcessGroups, rank: int) -> int:
        checked = steps(groups, rank)
        finished.wait(timeout=30)
        return checked

    assert run_threads(work, Mesh(tp=2, expert_parallel=True), tmp_path) == {0: 90, 1: 90}
    assert "no room for 4 MiB of shared memory: ranks 0, 1 talk through gloo" in caplog.text


def test_only_processes_of_one_host_with_kernels_share_memory():
    here, there = Member("a", 1, True), Member("b", 1, True)
    assert share_memory([here, Member("a", 2, True)])
    assert not share_memory([here, there])
    assert not share_memory([here, Member("a", 2, False)])


def test_calls_of_all_groups_are_timed_in_their_order(tmp_path):
    def work(groups: ProcessGroups, rank: int) -> list[tuple[str, str, int]]:
        groups.tp.all_reduce(torch.ones(1))
        groups.start_timing()
        groups.tp.all_reduce(torch.ones(8))
        groups.ep.all_to_all(torch.ones(3, 5), torch.tensor([1, 2]), "dispatch")
        groups.ep.all_to_all(torch.ones(0, 5), torch.tensor([0, 0]), "combine")
        if groups.next:
            groups.next.send(torch.ones(2, 2))
        if groups.previous:
            groups.previous.recv((2, 2), torch.float32)
        timed = groups.stop_timing()
        groups.tp.all_reduce(torch.ones(1))
        assert groups.seconds == pytest.approx(sum(call.seconds for call in timed))
        assert groups.stop_timing() == []
        return [(call.op, call.group, call.num_bytes) for call in timed]

    results = run_threads(work, Mesh(pp=2, tp=2, expert_parallel=True), tmp_path)
    for rank in range(4):
        leaving = 40 if rank % 2 == 0 else 20  # rows that a rank keeps do not travel
        assert results[rank] == [
            ("all_reduce", "tp", 32),
            ("dispatch", "ep", leaving),
            ("combine", "ep", 0),
            ("send" if rank < 2 else "recv", "pp", 16),
        ]


def die_at_rank_3(groups: ProcessGroups, rank: int) -> str:
    """Work without end; the last rank dies, and some ranks know it only through others that stop."""
    begun = threading.Event()

    def kill() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 3:
        threading.Thread(target=kill, daemon=True).start()
    try:
        while True:
            steps(groups, rank)
            begun.set()
    except CommunicationError as error:
        return str(error)


def test_the_death_of_one_rank_reaches_all_of_a_replica(tmp_path):
    results = run_ranks(die_at_rank_3, Mesh(pp=2, dp=2, expert_parallel=True), tmp_path, True)
    assert set(results) == {0, 1, 2}
    assert all("died" in str(result) or "left the group" in str(result) for result in results.values()), results
    assert any("the process of rank 3 died" in str(result) for result in results.values()), results
