"""The pieces of a calibration at a scale that takes no time: what they measure, they measure on real ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from ridgewalk.calibration import kernel_probes, rank_probes
from ridgewalk.calibration.collective_probes import measure_collectives
from ridgewalk.calibration.engine_probe import EngineTeam, StepPoint, StepsTask
from ridgewalk.calibration.figures import CollectiveRates
from ridgewalk.calibration.hardware_file import with_waits
from ridgewalk.calibration.kernel_probes import EXPERT_ROWS, QUERY_HEADS, ROWS, SLICED_ROWS
from ridgewalk.calibration.overheads import fit_overheads, fit_wait_s, left_per_layer_s, predicted_s
from ridgewalk.calibration.rank_probes import measure_rank, over_turns
from ridgewalk.calibration.rank_team import RankTeam, TeamTask
from ridgewalk.calibration.run import MAX_PROCESSES, in_parts, rank_counts
from ridgewalk.calibration.stopwatch import Sample, Stopwatch, interruptions
from ridgewalk.calibration.team import CalibrationError, Team, Turns
from ridgewalk.kernels.build import load_library
from ridgewalk.parallel.communicator import Communicator
from ridgewalk.placement.mesh import Mesh
from tests.calibration.test_hardware_file import machine
from tests.parallel.ranks import run_threads

ONE_RANK = Mesh()


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_every_rate_of_the_kernels_is_measured(name: str) -> None:
    task = TeamTask(1, 1, (name,), sample_s=0.0, cold_bytes=0)
    found = measure_rank(task, range(2), Communicator(0, 1, None), load_library())
    rates, itemsize = found.kernels[name], getattr(torch, name).itemsize
    assert found.collectives is None
    assert tuple(rates.product_flops) == ROWS
    assert tuple(rates.attention_bandwidth) == QUERY_HEADS
    assert rates.weight_bandwidth == pytest.approx(rates.product_flops[1] * itemsize / 2)
    assert tuple(rates.expert_flops) == EXPERT_ROWS
    assert tuple(rates.sliced_expert_flops) == SLICED_ROWS
    measured = (
        *rates.product_flops.values(),
        *rates.expert_flops.values(),
        *rates.sliced_expert_flops.values(),
        *rates.attention_bandwidth.values(),
        rates.attention_flops,
        rates.value_s,
    )
    assert min(*measured, rates.latent_attention_flops) > 0


def test_collectives_are_measured_among_ranks(tmp_path: Path) -> None:
    def work(groups, rank):
        return measure_collectives(groups.tp, Stopwatch(groups.tp, 0.0), lambda: sum(range(1000)))

    found = run_threads(work, Mesh(2), tmp_path)
    assert len(found) == 2
    for rates in found.values():
        assert isinstance(rates, CollectiveRates), rates
        assert min(msgspec.structs.astuple(rates)[:-1]) > 0


def test_what_ranks_straggle_is_what_computing_takes_longer_with_a_collective_after_it() -> None:
    reduced, exchanged = [1e-4, 2e-4], [3e-4, 5e-4]
    told = iter([*reduced, *exchanged])

    class Told(Stopwatch):
        def seconds_together(self, call: Callable[[], object], calls: int) -> float:
            return next(told)

        def seconds_meeting(
            self, compute: Callable[[], object], meet: Callable[[], object], calls: int
        ) -> tuple[float, float]:
            return 1.4e-3, 1e-3

    pair = Communicator(0, 2, None)
    rates = measure_collectives(pair, Told(pair, 0.0), list)
    assert (rates.all_reduce_latency_s, rates.all_to_all_latency_s, rates.straggle) == pytest.approx((1e-4, 3e-4, 0.3))


def test_interruptions_are_what_calls_take_longer_in_the_mean_than_in_the_median() -> None:
    usual, interrupted = Sample(8.0, 8), Sample(12.0, 2)  # a call that took ten times as long ended the sample
    assert interruptions([[usual] * 10]) == 0.0
    assert interruptions([[usual] * 9 + [interrupted]]) == pytest.approx((84 / 74) - 1)
    assert interruptions([[usual] * 9 + [interrupted], [usual] * 10]) == pytest.approx((84 / 74 - 1) / 2)
    assert interruptions([[Sample(1.0, 2), usual, usual]]) == 0.0


def test_rates_are_slower_by_the_interruptions_of_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopwatch for which a call takes 1 ms, but in one turn of four twice as long."""

    class Told(Stopwatch):
        def sample(self, call: Callable[[], object]) -> Sample:
            return Sample(8e-3, 4 if now == [2] else 8)

    def turns() -> Iterator[None]:
        for now[0] in range(4):
            yield

    now = [0]
    monkeypatch.setattr(rank_probes, "Stopwatch", Told)
    task = TeamTask(1, 1, ("float32",), sample_s=0.0, cold_bytes=0)
    found = measure_rank(task, turns(), Communicator(0, 1, None), load_library()).kernels["float32"]
    one_row_flops = 4 * kernel_probes.SIDE**2
    assert found.product_flops[1] == pytest.approx(one_row_flops / 1e-3 / (32 / 28))


def test_collectives_are_typical_of_the_turns_but_straggling_is_their_mean() -> None:
    turns = [CollectiveRates(1e-6 * at, 1e9, 1e-5, 1e9, 0.02 if at < 4 else 0.42) for at in range(1, 5)]
    found = over_turns(turns)
    assert found is not None
    assert (found.all_reduce_latency_s, found.straggle) == pytest.approx((2.5e-6, 0.12))
    assert over_turns([]) is None


def test_a_team_of_ranks_measures_together(tmp_path: Path) -> None:
    with RankTeam(TeamTask(2, 1, ("float32",), sample_s=0.0, cold_bytes=0, collectives=True), tmp_path) as team:
        team.turn()
        team.finish()
    assert [set(rank.kernels) for rank in team.figures()] == [{"float32"}] * 2
    assert all(rank.collectives is not None for rank in team.figures())


@pytest.mark.parametrize(
    "task",
    [
        StepsTask(2, 1, Mesh(), (1, 4), num_steps=8),
        StepsTask(2, 1, Mesh(dp=2, expert_parallel=True), (1, 4), num_steps=8, sparse=True),
    ],
    ids=lambda task: task.name,
)
def test_steps_of_a_small_model_are_measured_through_the_engine(task: StepsTask, tmp_path: Path) -> None:
    with EngineTeam(task, tmp_path) as team:
        team.turn()
        team.finish()
    points = team.points()
    assert [(point.task, point.num_sequences) for point in points] == [(task, 1), (task, 4)]
    assert all(point.seconds >= 0 for point in points)  # of a model so small, steps that were ahead end together


def count_turns(turns: Turns, log: Path, name: str) -> None:
    number = 0
    for number, _ in enumerate(turns, 1):
        turns.together()
        with log.open("a") as file:
            file.write(f"{name}{number} ")
    turns.tell(f"{name} had {number}".encode())


def test_teams_take_turns_and_tell_of_all_of_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pair = Team("a pair", count_turns, [(log, "a"), (log, "b")])
    single = Team("one", count_turns, [(log, "c")])
    with pair, single:
        for _ in range(2):
            pair.turn()
            single.turn()
        pair.finish()
        single.finish()
    assert (pair.told, single.told) == ([b"a had 2", b"b had 2"], [b"c had 2"])
    assert [sorted(each) for each in zip(*[iter(log.read_text().split())] * 3, strict=True)] == [
        ["a1", "b1", "c1"],
        ["a2", "b2", "c2"],
    ]
    assert log.read_text().split()[2::3] == ["c1", "c2"]


def end_in(turns: Turns, when: str) -> None:
    if when == "start":
        os._exit(3)
    for _ in turns:
        if when == "turn":
            os._exit(3)


def wait_or_be_killed(turns: Turns, killed: bool) -> None:
    for _ in turns:
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        turns.together()


def test_who_is_killed_is_named_and_not_who_waits_for_it() -> None:
    with (
        pytest.raises(CalibrationError, match="process 2 of 2 was ended by SIGKILL; is the machine out of memory"),
        Team("two", wait_or_be_killed, [(False,), (True,)]) as team,
    ):
        team.turn()


@pytest.mark.parametrize("when", ["start", "turn"])
def test_a_process_that_ends_is_an_error_in_words(when: str) -> None:
    with (
        pytest.raises(CalibrationError, match=r"^two: process 2 of 2 was ended with exit code 3"),
        Team("two", end_in, [("never",), (when,)]) as team,
    ):
        team.turn()


def test_no_more_processes_are_alive_at_once_than_a_machine_bears() -> None:
    sizes = [MAX_PROCESSES // 2, MAX_PROCESSES // 2, 1, 2 * MAX_PROCESSES, 3]
    assert list(in_parts(sizes)) == [[0, 1], [2], [3], [4]]


def points(
    seconds: Callable[[StepPoint], float], replicas: int = 1, mesh: Mesh = ONE_RANK, sparse: bool = False
) -> list[StepPoint]:
    tasks = [StepsTask(layers, replicas, mesh, (1, 32), num_steps=20, sparse=sparse) for layers in (2, 12)]
    shapes = [StepPoint(task, sequences, 50.0, 0.0) for task in tasks for sequences in task.batches]
    return [msgspec.structs.replace(shape, seconds=seconds(shape)) for shape in shapes]


def test_overheads_are_what_steps_take_beyond_the_cost_model() -> None:
    bare = msgspec.structs.replace(machine(), layer_overhead_s=0.0, step_overhead_s=0.0, sequence_overhead_s=0.0)

    def seconds(at: StepPoint) -> float:
        return predicted_s(at, bare) + 1e-3 + at.num_sequences * 5e-6 + at.task.num_layers * 4e-5

    found = fit_overheads(points(seconds, replicas=2), bare)
    assert msgspec.structs.astuple(found) == pytest.approx((1e-3, 5e-6, 4e-5))


def test_a_sparse_layer_costs_what_steps_of_a_sparse_model_take_beyond_a_dense_ones_overheads() -> None:
    known = machine()
    steps = points(lambda at: predicted_s(at, known) + at.task.num_layers * 9e-5, replicas=2, sparse=True)
    found = left_per_layer_s(steps, known)
    assert found == pytest.approx(9e-5)
    sparse = msgspec.structs.replace(known, sparse_layer_overhead_s=found)
    assert predicted_s(steps[-1], sparse) == pytest.approx(steps[-1].seconds)
    assert left_per_layer_s([msgspec.structs.replace(steps[0], seconds=0.0)], known) == 0


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(dp=2, expert_parallel=True)], ids=lambda mesh: mesh.name)
def test_waiting_is_what_steps_of_ranks_in_lockstep_take_beyond_their_overheads(mesh: Mesh) -> None:
    known, sparse = machine(), mesh.expert_parallel
    steps = points(lambda at: predicted_s(at, known) + 2 * at.task.num_layers * 7e-5, mesh=mesh, sparse=sparse)
    wait_s = fit_wait_s(steps, known)
    assert wait_s == pytest.approx(7e-5)
    waiting = with_waits(known, *((0.0, wait_s) if sparse else (wait_s, 0.0)))
    assert waiting.within_node is not None
    assert waiting.all_to_all is not None
    latencies = waiting.within_node.latency_s, waiting.all_to_all.latency_s
    assert latencies == pytest.approx((4e-6, 8e-5) if sparse else (7.4e-5, 1e-5))
    assert predicted_s(steps[0], waiting) == pytest.approx(steps[0].seconds)


def test_ranks_are_counted_in_powers_of_two_up_to_the_cores() -> None:
    assert [rank_counts(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
