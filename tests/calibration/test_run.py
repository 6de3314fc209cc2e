"""A whole calibration, of a machine that is known: teams tell what the cost model says that it would take, and what is
made of it must be that machine again. How near the model is to real machines is for benchmarks.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typing_extensions import Self

from ridgewalk.calibration import run
from ridgewalk.calibration.engine_probe import StepPoint, StepsTask
from ridgewalk.calibration.figures import CollectiveRates, Overheads, RankFigures
from ridgewalk.calibration.hardware_file import hardware_spec, rank_rates, with_waits
from ridgewalk.calibration.overheads import predicted_s
from ridgewalk.calibration.rank_team import TeamTask
from ridgewalk.placement.hardware import HardwareSpec, RankRates
from tests.calibration.test_hardware_file import COLLECTIVES, close, figures

EXTENT = run.Extent(turns=3)
TEAMS = {
    1: [figures(2.0)],
    2: [figures(0.9, alone=False), figures(1.1, alone=False)],
    4: [figures(factor, alone=False) for factor in (0.4, 0.5, 0.5, 0.6)],
}
OVERHEADS = {1: Overheads(1e-3, 2e-6, 3e-5), 2: Overheads(2e-3, 4e-6, 5e-5), 4: Overheads(5e-3, 9e-6, 9e-5)}
SPARSE_S = {1: 2e-5, 2: 4e-5, 4: 7e-5}
ALL_REDUCE_WAIT_S, ALL_TO_ALL_WAIT_S = 6e-5, 8e-5


def known_rates(ranks: int) -> RankRates:
    rates = rank_rates(TEAMS[ranks], OVERHEADS[ranks])
    return msgspec.structs.replace(rates, sparse_layer_overhead_s=SPARSE_S[ranks])


def known_machine(cores: int) -> HardwareSpec:
    collectives: list[CollectiveRates] = [COLLECTIVES] if cores > 1 else []
    rates = {ranks: known_rates(ranks) for ranks in run.rank_counts(cores)}
    bare = hardware_spec("", 1, run.CPU_SHARE, run.RANK_PROCESS_BYTES, rates, collectives)
    return with_waits(bare, ALL_REDUCE_WAIT_S, ALL_TO_ALL_WAIT_S) if cores > 1 else bare


class KnownTeam:
    """A team that takes turns without doing anything."""

    log: list[tuple[str, str]]

    def __init__(self, name: str, num_processes: int) -> None:
        self.about, self.num_processes = name, num_processes

    def __enter__(self) -> Self:
        self.log.append((self.about, "start"))
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append((self.about, "end"))

    def turn(self) -> None:
        self.log.append((self.about, "turn"))

    def finish(self) -> None:
        self.log.append((self.about, "finish"))


class KnownRanks(KnownTeam):
    """Ranks with the kernels of `TEAMS`."""

    def __init__(self, task: TeamTask, folder: Path) -> None:
        super().__init__(f"{task.num_ranks} ranks", task.num_ranks)
        self.task = task

    def figures(self) -> list[RankFigures]:
        return TEAMS[self.task.num_ranks]


class KnownEngines(KnownTeam):
    """Engines whose steps take what the cost model says of `machine`."""

    machine: HardwareSpec

    def __init__(self, task: StepsTask, folder: Path) -> None:
        super().__init__(f"steps of {task.name}", task.replicas + task.num_ranks)
        self.task = task

    def points(self) -> list[StepPoint]:
        hardware = self.machine.shared_by(self.task.num_ranks, self.task.replicas)
        points = [StepPoint(self.task, batch, 26.0, 0.0) for batch in self.task.batches]
        return [msgspec.structs.replace(each, seconds=predicted_s(each, hardware)) for each in points]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(KnownTeam, "log", written, raising=False)
    monkeypatch.setattr(run, "RankTeam", KnownRanks)
    monkeypatch.setattr(run, "EngineTeam", KnownEngines)
    return written


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_a_known_machine_is_found(cores: int, log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = known_machine(cores)
    monkeypatch.setattr(KnownEngines, "machine", machine, raising=False)
    found = run.measure_machine(cores, EXTENT, lambda stage, done, total: None)
    assert close(msgspec.structs.replace(found, about="", memory_bytes=machine.memory_bytes), machine)


def test_all_teams_of_a_small_machine_take_turns_and_progress_ends_at_the_total(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KnownEngines, "machine", known_machine(2), raising=False)
    told: list[tuple[int, int]] = []
    run.measure_machine(2, EXTENT, lambda stage, done, total: told.append((done, total)))
    teams = list(dict.fromkeys(name for name, _ in log))
    turns = [name for name, what in log if what == "turn"]
    assert turns == teams * EXTENT.turns
    assert {"1 ranks", "2 ranks", "steps of 12 layers, 1 x TP2", "steps of 12 sparse layers, 1 x DP2xEP2"} <= set(teams)
    stages = [("start", 1), ("turn", EXTENT.turns), ("finish", 1), ("end", 1)]
    assert [what for _, what in log] == [what for what, count in stages for _ in range(count * len(teams))]
    assert told[-1][0] == told[-1][1]
    assert sorted(told) == told


def test_what_is_subtracted_from_each_other_is_measured_in_the_same_turns(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MAX_PROCESSES", 8)
    monkeypatch.setattr(KnownEngines, "machine", known_machine(4), raising=False)
    run.measure_machine(4, EXTENT, lambda stage, done, total: None)
    part_of: dict[str, int] = {}
    part, alive = 0, 0
    for name, what in log:
        part_of.setdefault(name, part)
        alive += {"start": 1, "end": -1}.get(what, 0)
        part += alive == 0
    by_ranks = {
        ranks: {part for name, part in part_of.items() if f"{ranks} ranks" == name or f", {ranks} x TP1" in name}
        for ranks in (1, 2, 4)
    }
    assert all(len(parts) == 1 for parts in by_ranks.values()), part_of
    assert len(set().union(*by_ranks.values())) > 1
    assert part_of["steps of 12 layers, 1 x TP4"] == part_of["4 ranks"]
