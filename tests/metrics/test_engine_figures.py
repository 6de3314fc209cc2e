"""Figures of time and work of real engines, worked out on paper."""

from __future__ import annotations

import pytest

from ridgewalk.engine.request import FinishReason
from ridgewalk.metrics.utilization import HardwarePeaks
from tests.metrics.builders import Clock
from tests.metrics.replicas import Replica, prompt


def test_queue_time_is_from_arrival_to_the_first_schedule_and_a_preemption_adds_nothing() -> None:
    """One seat; a step takes 0.5 s. Each sequence computes for two steps, so they wait 0, 1 and 2 s; a fourth that
    leaves before its turn is not counted."""
    clock = Clock()
    replica = Replica(clock, max_num_seqs=1)
    *_, gone = [replica.ask(prompt(4, number), 2) for number in range(4)]
    replica.step(2, seconds=0.5)
    replica.core.finish(gone, FinishReason.ABORT)
    replica.step(5, seconds=0.5)
    assert replica.core.has_work is False
    assert replica.value("request_queue_time_seconds_sum") == 3
    counts = {bound: replica.value("request_queue_time_seconds_bucket", le=bound) for bound in ("0.75", "1.0", "2.5")}
    assert counts == {"0.75": 1, "1.0": 2, "2.5": 3}
    assert replica.value("request_queue_time_seconds_count") == 3
    assert replica.value("engine_steps_total") == 6


def test_a_preempted_sequence_was_admitted_once() -> None:
    clock = Clock()
    replica = Replica(clock, num_blocks=4)
    for number in range(2):
        replica.ask(prompt(7, number), 5)
    while replica.core.has_work:
        replica.step(seconds=1)
    assert replica.value("num_preemptions_total") == 1
    assert replica.value("request_queue_time_seconds_count") == 2
    assert replica.value("request_queue_time_seconds_sum") == 0
    assert replica.value("prompt_tokens_total") == 14
    assert replica.value("sequences_ended_total", finished_reason="length") == 2


def test_utilization_is_that_of_the_last_second() -> None:
    """A step every 0.5 s. A token takes 2 * 1664 FLOPs of weights and 64 for each token of its context; a step reads
    2216 weights of 4 bytes and 64 bytes for each filled slot.

    After 1 s the window holds the second and third step, of one token at 5 and 6 filled slots; the prompt was before.
    """
    replica = Replica(Clock(), peaks=HardwarePeaks(1e5, 1e6))
    replica.ask(prompt(4), 8)
    replica.step(2, seconds=0.5)
    assert replica.value("model_flops_utilization") is None  # no whole second yet
    replica.step()
    assert replica.value("model_flops_utilization") == pytest.approx((2 * 3328 + 64 * (5 + 6)) / 1e5)
    assert replica.value("model_bandwidth_utilization") == pytest.approx((2 * 8864 + 64 * (5 + 6)) / 1e6)


def test_recomputed_tokens_are_read_again_but_are_no_use() -> None:
    """7 + 7 prompt tokens and 4 of 5 outputs each are of use, 8 are recomputed; all of it within 2 s of one report."""
    clock = Clock()
    replica = Replica(clock, num_blocks=4, peaks=HardwarePeaks(1e5, 1e6), enable_prefix_caching=False)
    for number in range(2):
        replica.ask(prompt(7, number), 5)
    while replica.core.has_work:
        replica.core.pump()
    clock.now += 2
    replica.report()
    assert replica.value("recomputed_tokens_total") == 8
    assert replica.value("model_flops_utilization") == pytest.approx(22 * 3328 / 2 / 1e5)  # no context is left
