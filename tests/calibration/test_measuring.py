"""The pieces of a calibration at a scale that takes no time: what they measure, they measure on real ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from ridgewalk.calibration.collective_probes import measure_collectives
from ridgewalk.calibration.engine_probe import StepPoint, StepsTask, measure_steps
from ridgewalk.calibration.figures import CollectiveRates
from ridgewalk.calibration.hardware_file import with_wait
from ridgewalk.calibration.kernel_probes import QUERY_HEADS, ROWS
from ridgewalk.calibration.overheads import fit_overheads, fit_wait_s, predicted_s
from ridgewalk.calibration.processes import CalibrationError, receive
from ridgewalk.calibration.rank_probes import measure_rank
from ridgewalk.calibration.rank_team import TeamTask, measure_team
from ridgewalk.calibration.run import rank_counts
from ridgewalk.calibration.stopwatch import Effort, Stopwatch, lower_quartile
from ridgewalk.kernels.build import load_library
from ridgewalk.parallel.communicator import Communicator
from ridgewalk.placement.mesh import Mesh
from tests.calibration.test_hardware_file import machine
from tests.parallel.ranks import run_threads

BRIEF = Effort(samples=2, sample_s=0.0)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_every_rate_of_the_kernels_is_measured(name: str) -> None:
    task = TeamTask(1, 1, (name,), passes=2, samples=1, sample_s=0.0, cold_bytes=0)
    found = measure_rank(task, Communicator(0, 1, None), load_library())
    rates, itemsize = found.kernels[name], getattr(torch, name).itemsize
    assert found.collectives is None
    assert tuple(rates.product_flops) == ROWS
    assert tuple(rates.attention_bandwidth) == QUERY_HEADS
    assert rates.weight_bandwidth == pytest.approx(rates.product_flops[1] * itemsize / 2)
    measured = (
        *rates.product_flops.values(),
        *rates.attention_bandwidth.values(),
        rates.attention_flops,
        rates.value_s,
    )
    assert min(*measured, rates.latent_attention_flops) > 0


def test_collectives_are_measured_among_ranks_and_not_by_one_alone(tmp_path: Path) -> None:
    def work(groups, rank):
        return measure_collectives(groups.tp, Stopwatch(groups.tp, BRIEF))

    found = run_threads(work, Mesh(2), tmp_path)
    assert len(found) == 2
    for rates in found.values():
        assert isinstance(rates, CollectiveRates), rates
        assert min(msgspec.structs.astuple(rates)) > 0
    alone = Communicator(0, 1, None)
    assert measure_collectives(alone, Stopwatch(alone, BRIEF)) is None


def test_a_team_of_processes_measures_together() -> None:
    found = measure_team(TeamTask(2, 1, ("float32",), passes=1, samples=1, sample_s=0.0, cold_bytes=0))
    assert [set(rank.kernels) for rank in found] == [{"float32"}] * 2
    assert all(rank.collectives is not None for rank in found)


def test_a_rank_that_fails_is_an_error_in_words() -> None:
    own, others = multiprocessing.Pipe(duplex=False)
    others.close()  # as the end of its process does
    with pytest.raises(CalibrationError, match="rank 3 ended before it had measured anything"):
        receive(3, own)


def test_steps_of_a_small_model_are_measured_through_the_engine(tmp_path: Path) -> None:
    points = measure_steps(StepsTask(2, 1, 1, (1, 4), num_steps=8, passes=1), tmp_path)
    assert [(point.num_layers, point.num_sequences) for point in points] == [(2, 1), (2, 4)]
    assert all(point.seconds >= 0 for point in points)  # of a model so small, steps that were ahead end together


def points(seconds: Callable[[StepPoint], float]) -> list[StepPoint]:
    shapes = [StepPoint(layers, sequences, 50.0, 0.0) for layers in (2, 12) for sequences in (1, 32)]
    return [msgspec.structs.replace(shape, seconds=seconds(shape)) for shape in shapes]


def test_overheads_are_what_steps_take_beyond_the_cost_model() -> None:
    bare = msgspec.structs.replace(machine(), layer_overhead_s=0.0, step_overhead_s=0.0, sequence_overhead_s=0.0)
    steps = points(
        lambda at: predicted_s(at, bare, 2, 1) + 1e-3 + at.num_sequences * 5e-6 + at.num_layers * 4e-5
    )  # fmt: skip
    assert msgspec.structs.astuple(fit_overheads(steps, bare, 2)) == pytest.approx((1e-3, 5e-6, 4e-5))


def test_waiting_is_what_steps_of_ranks_in_lockstep_take_beyond_their_overheads() -> None:
    known = machine()
    steps = points(lambda at: predicted_s(at, known, 2, 2) + 2 * at.num_layers * 7e-5)
    wait_s = fit_wait_s(steps, known, 2)
    assert wait_s == pytest.approx(7e-5)
    waiting = with_wait(known, wait_s)
    assert waiting.within_node is not None
    assert waiting.all_to_all is not None
    assert (waiting.within_node.latency_s, waiting.all_to_all.latency_s) == pytest.approx((7.4e-5, 8e-5))
    assert predicted_s(steps[0], waiting, 2, 2) == pytest.approx(steps[0].seconds)


def test_ranks_are_counted_in_powers_of_two_up_to_the_cores() -> None:
    assert [rank_counts(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_one_disturbed_sample_changes_nothing() -> None:
    assert lower_quartile([1.0, 1.1, 1.2, 90.0]) == lower_quartile([1.0, 1.1, 1.2, 1.3])
