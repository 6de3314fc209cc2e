"""What `ridgewalk calibrate` does, from measuring to the file."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ridgewalk import __version__
from ridgewalk.calibration.engine_probe import EngineTeam, StepPoint, StepsTask
from ridgewalk.calibration.figures import CollectiveRates, RankFigures
from ridgewalk.calibration.hardware_file import NO_OVERHEADS, as_yaml, hardware_spec, rank_rates, with_waits
from ridgewalk.calibration.kernel_probes import COLD_BYTES
from ridgewalk.calibration.overheads import fit_overheads, fit_wait_s, left_per_layer_s
from ridgewalk.calibration.rank_team import RankTeam, TeamTask
from ridgewalk.calibration.team import CalibrationError
from ridgewalk.config import ConfigError
from ridgewalk.machine import calibration_path, cpu_name, num_cores
from ridgewalk.placement.hardware import HardwareSpec, RankRates
from ridgewalk.placement.mesh import Mesh
from ridgewalk.replica.host import memory_bytes
from ridgewalk.replica.sizing import CPU_SHARE, RANK_PROCESS_BYTES

MAX_PROCESSES = 64
"""Alive at once, each with a torch of its own. Beyond it numbers of ranks are measured one part after the other."""

LEAST_COLD_BYTES = 24 * 2**20
"""Of a rank, however many there are."""

DISTURBED = 0.1
"""Of the cores, taken by other programs: from here on the figures are not the machine's."""


@dataclass(frozen=True)
class Extent:
    """How much is measured, in many short turns. The defaults take two to three minutes on two cores."""

    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    turns: int = 16
    sample_s: float = 0.008
    cold_bytes: int = COLD_BYTES
    layers: tuple[int, ...] = (2, 12)
    batches: tuple[int, ...] = (1, 32)
    num_steps: int = 20


def run_calibration(out: Path | None) -> None:
    """See `ridgewalk.calibration.command.calibrate`. Raises ConfigError."""
    path, console = out or calibration_path(), Console(stderr=True, soft_wrap=True)
    _check_writable(path)
    began, busy, own = time.monotonic(), _busy_s(), _own_s()
    # Drawn when there is news: a thread that draws would take a core from what is measured.
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, auto_refresh=False
    ) as progress:
        task = progress.add_task("", total=None)

        def tell(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total, refresh=True)

        try:
            hardware = measure_machine(num_cores(), Extent(), tell)
        except CalibrationError as error:
            raise ConfigError(f"this machine could not be measured: {error}") from None
    seconds = time.monotonic() - began
    others = max(0.0, (_busy_s() - busy - (_own_s() - own)) / seconds / (psutil.cpu_count() or 1))
    note = (
        f"Measured by ridgewalk {__version__} calibrate in {seconds:.0f} s, {time.strftime('%Y-%m-%d %H:%M')}; other "
        f"programs took {others:.0%} of the cores meanwhile."
    )
    path.write_text(as_yaml(hardware, note))
    if others > DISTURBED:
        console.print(
            f"[yellow]warning:[/] other programs took {others:.0%} of the cores meanwhile; measure again when they rest"
        )
    console.print(f"wrote {path}", markup=False, highlight=False)
    given = "this-machine" if out is None else str(out)
    console.print(f"use it with: ridgewalk plan --hardware {given} --model MODEL", markup=False, highlight=False)


def rank_counts(cores: int) -> list[int]:
    """Numbers of ranks that are measured: powers of two, and one rank a core."""
    return sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores} | {cores})


def measure_machine(cores: int, extent: Extent, tell: Callable[[str, int, int], None]) -> HardwareSpec:
    """All of it. ``tell`` hears what is done next, and how many of how many parts are done.

    Raises:
        CalibrationError: a rank failed.
    """
    counts, deep = rank_counts(cores), extent.layers[-1:]
    with tempfile.TemporaryDirectory() as name:
        make = partial(_engine_teams, extent, Path(name))
        kernels = {ranks: _rank_team(extent, cores, ranks, Path(name)) for ranks in counts}
        dense = {ranks: make(ranks, Mesh(), extent.layers) for ranks in counts}
        sparse = {ranks: make(ranks, Mesh(), deep, sparse=True) for ranks in counts}
        reducing = make(1, Mesh(tp=cores), deep) if cores > 1 else []
        exchanging = make(1, Mesh(dp=cores, expert_parallel=True), deep, sparse=True) if cores > 1 else []
        # What is subtracted from each other takes turns on machines of any size.
        together = [[kernels[ranks], *dense[ranks], *sparse[ranks]] for ranks in counts]
        together[-1] += [*reducing, *exchanging]
        _measure(together, extent.turns, tell)
    figures = {ranks: team.figures() for ranks, team in kernels.items()}
    rates = {ranks: rank_rates(found, NO_OVERHEADS) for ranks, found in figures.items()}
    hardware = _describe(figures, rates)
    for ranks, teams in dense.items():
        rates[ranks] = rank_rates(figures[ranks], fit_overheads(_points(teams), hardware.shared_by(ranks)))
    hardware = _describe(figures, rates)
    for ranks, teams in sparse.items():
        left_s = left_per_layer_s(_points(teams), hardware.shared_by(ranks))
        rates[ranks] = msgspec.structs.replace(rates[ranks], sparse_layer_overhead_s=left_s)
    hardware = _describe(figures, rates)
    if cores == 1:
        return hardware
    replica = hardware.shared_by(cores, 1)
    return with_waits(hardware, fit_wait_s(_points(reducing), replica), fit_wait_s(_points(exchanging), replica))


def _rank_team(extent: Extent, cores: int, ranks: int, folder: Path) -> RankTeam:
    cold_bytes = min(extent.cold_bytes, max(extent.cold_bytes // ranks, LEAST_COLD_BYTES))  # caches are shared too
    collectives = 1 < ranks == cores  # links are those among all
    task = TeamTask(ranks, cores // ranks, extent.dtypes, extent.sample_s, cold_bytes, collectives)
    return RankTeam(task, folder)


def _engine_teams(
    extent: Extent, folder: Path, replicas: int, mesh: Mesh, layers: Sequence[int], sparse: bool = False
) -> list[EngineTeam]:
    tasks = [StepsTask(each, replicas, mesh, extent.batches, extent.num_steps, sparse) for each in layers]
    return [EngineTeam(task, folder) for task in tasks]


def _points(teams: Sequence[EngineTeam]) -> list[StepPoint]:
    return [point for team in teams for point in team.points()]


def _measure(
    together: Sequence[Sequence[RankTeam | EngineTeam]], turns: int, tell: Callable[[str, int, int], None]
) -> None:
    done, total = 0, sum(len(teams) for teams in together) * (1 + turns)
    for part in in_parts([sum(team.num_processes for team in teams) for teams in together]):
        some = [team for index in part for team in together[index]]
        with ExitStack() as stack:
            for team in some:
                tell(f"starting: {team.about}", done, total)
                stack.enter_context(team)
                done += 1
            for turn in range(turns):
                for team in some:
                    tell(f"turn {turn + 1} of {turns}: {team.about}", done, total)
                    team.turn()
                    done += 1
            for team in some:
                team.finish()
    tell("done", total, total)


def in_parts(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Indices of what is measured in turns with each other, by numbers of processes."""
    part: list[int] = []
    for index, size in enumerate(sizes):
        if part and sum(sizes[other] for other in part) + size > MAX_PROCESSES:
            yield part
            part = []
        part.append(index)
    yield part


def _describe(figures: dict[int, list[RankFigures]], rates: dict[int, RankRates]) -> HardwareSpec:
    cores = max(figures)
    about = f"{cpu_name()}, {cores} core{'s' * (cores > 1)}, {memory_bytes() / 2**30:.1f} GiB"
    collectives: list[CollectiveRates] = [rank.collectives for rank in figures[cores] if rank.collectives is not None]
    return hardware_spec(about, memory_bytes(), CPU_SHARE, RANK_PROCESS_BYTES, rates, collectives)


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written: {error.strerror}") from None
    if path.stat().st_size == 0:
        path.unlink()


def _busy_s() -> float:
    """Processor time that everything on this machine has taken."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _own_s() -> float:
    """Processor time of this process and of those children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
