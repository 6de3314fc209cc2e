"""Links between pipeline stages: order, running ahead, bubbles, and no hang when the other end is gone."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from ridgewalk.parallel.communicator import CommunicationError
from ridgewalk.parallel.process_groups import ProcessGroups
from ridgewalk.parallel.shared_ring import RING_SLOTS
from ridgewalk.parallel.torch_pipe import MAX_AHEAD
from ridgewalk.placement.mesh import Mesh
from tests.parallel.ranks import run_ranks, run_threads

PP2 = Mesh(pp=2)
SHAPES = ((1, 64), (32, 1024), (0, 64), (1, 700, 1000), (1,), (3, 2, 5))  # the fourth is larger than a slot
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
BOTH = pytest.mark.parametrize("shared", [True, False], ids=["shared", "gloo"])


def sequence() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    numbered = [(shape, dtype) for _ in range(3) for shape in SHAPES for dtype in DTYPES]
    return [torch.randint(0, 100, shape, generator=generator).to(dtype) for shape, dtype in numbered]


def send_until_the_receiver_leaves(groups: ProcessGroups) -> str:
    """Gloo drops what is under way when its connection closes: so the receiver goes first."""
    try:
        while True:
            groups.next.send(torch.ones(1))
    except CommunicationError as error:
        return str(error)


def stream(groups: ProcessGroups, rank: int) -> str:
    """The first stage sends, those after it pass on what they received."""
    for tensor in sequence():
        received = groups.previous.recv(tensor.shape, tensor.dtype) if groups.previous else tensor.clone()
        assert received.dtype == tensor.dtype
        assert torch.equal(received, tensor)
        if groups.next:
            groups.next.send(received)
            received.zero_()  # a tensor that was sent is the sender's again
    if groups.next:
        send_until_the_receiver_leaves(groups)
    return "done"


@BOTH
def test_tensors_come_whole_and_in_order(tmp_path, shared):
    assert run_threads(stream, Mesh(pp=4), tmp_path, shared) == dict.fromkeys(range(4), "done")


@BOTH
def test_between_processes(tmp_path, shared):
    assert run_ranks(stream, Mesh(pp=3), tmp_path, shared) == dict.fromkeys(range(3), "done")


@BOTH
def test_a_sender_runs_ahead_and_then_waits(tmp_path, shared):
    """The receiver takes nothing until the sender has given up at one tensor too many."""
    gave_up, slots = threading.Event(), RING_SLOTS if shared else MAX_AHEAD

    def work(groups: ProcessGroups, rank: int) -> str:
        if rank == 1:
            gave_up.wait()
            return "done"
        for index in range(slots):
            groups.next.send(torch.full((8,), index))
        with pytest.raises(CommunicationError):
            groups.next.send(torch.ones(8))
        gave_up.set()
        return "done"

    assert run_threads(work, PP2, tmp_path, shared, timeout_s=0.5) == {0: "done", 1: "done"}


@BOTH
def test_the_receiver_gets_what_was_sent_ahead(tmp_path, shared):
    sent, received, slots = threading.Event(), threading.Event(), RING_SLOTS if shared else MAX_AHEAD

    def work(groups: ProcessGroups, rank: int) -> list[int]:
        if rank == 0:
            for index in range(slots):
                groups.next.send(torch.full((8,), index))
            sent.set()
            received.wait()
            return []
        sent.wait()
        values = [int(groups.previous.recv((8,), torch.int64)[7]) for _ in range(slots)]
        assert groups.previous.bubble_seconds == 0 or not shared  # everything was there
        received.set()
        return values

    assert run_threads(work, PP2, tmp_path, shared)[1] == list(range(slots))


@BOTH
def test_waiting_for_input_is_bubble_and_not_transfer(tmp_path, shared):
    """The second recv waits in vain."""
    gave_up = threading.Event()

    def work(groups: ProcessGroups, rank: int) -> float:
        if rank == 0:
            groups.next.send(torch.ones(5, 2))
            gave_up.wait()
            return 0.0
        groups.start_timing()
        groups.previous.recv((5, 2), torch.float32)
        before = groups.previous.bubble_seconds
        with pytest.raises(CommunicationError):
            groups.previous.recv((5, 2), torch.float32)
        gave_up.set()
        timed = groups.stop_timing()
        assert [(t.op, t.num_bytes, t.group) for t in timed] == [("recv", 40, "pp")]
        assert groups.seconds == timed[0].seconds > 0
        return groups.previous.bubble_seconds - before

    assert run_threads(work, PP2, tmp_path, shared, timeout_s=0.5)[1] >= 0.5


@BOTH
def test_a_tensor_of_another_size_is_an_error(tmp_path, shared):
    refused = threading.Event()

    def work(groups: ProcessGroups, rank: int) -> str:
        if rank == 0:
            groups.next.send(torch.ones(3, 8))
            refused.wait()
            return "sent"
        with pytest.raises(CommunicationError, match="rank 1: a peer's tensor has another size"):
            groups.previous.recv((4, 8), torch.float32)
        refused.set()
        return "refused"

    assert run_threads(work, PP2, tmp_path, shared) == {0: "sent", 1: "refused"}


def test_what_was_sent_before_leaving_is_received(tmp_path):
    left = threading.Event()

    def work(groups: ProcessGroups, rank: int) -> str:
        if rank == 0:
            groups.next.send(torch.ones(4))
            groups.next.close()
            left.set()
            return "left"
        left.wait()
        assert groups.previous.recv((4,), torch.float32).tolist() == [1.0] * 4
        with pytest.raises(CommunicationError, match="a peer left the group"):
            groups.previous.recv((4,), torch.float32)
        return "told"

    assert run_threads(work, PP2, tmp_path) == {0: "left", 1: "told"}


def die_as_sender(groups: ProcessGroups, rank: int) -> str:
    if rank == 0:
        groups.next.send(torch.ones(4))
        # until the receiver has said, by taking them, that it is in the middle of it
        for _ in range(MAX_AHEAD + 1):
            groups.next.send(torch.ones(4))
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            groups.previous.recv((4,), torch.float32)
    except CommunicationError as error:
        return str(error)


@BOTH
def test_a_receiver_notices_that_the_sender_died(tmp_path, shared):
    results = run_ranks(die_as_sender, PP2, tmp_path, shared)
    assert set(results) == {1}
    assert "rank 1: the process of rank 0 died" in str(results[1])


def die_as_receiver(groups: ProcessGroups, rank: int) -> str:
    if rank == 1:
        groups.previous.recv((1,), torch.float32)
        os.kill(os.getpid(), signal.SIGKILL)
    return send_until_the_receiver_leaves(groups)


@BOTH
def test_a_sender_notices_that_the_receiver_died(tmp_path, shared):
    results = run_ranks(die_as_receiver, PP2, tmp_path, shared)
    assert set(results) == {0}
    assert "rank 0: the process of rank 1 died" in str(results[0])
