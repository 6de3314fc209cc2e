"""What `ridgewalk calibrate` does, from measuring to the file."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ridgewalk import __version__
from ridgewalk.calibration.engine_probe import StepPoint, StepsTask, measure_steps
from ridgewalk.calibration.figures import CollectiveRates, RankFigures
from ridgewalk.calibration.hardware_file import NO_OVERHEADS, as_yaml, hardware_spec, rank_rates, with_wait
from ridgewalk.calibration.kernel_probes import COLD_BYTES
from ridgewalk.calibration.overheads import fit_overheads, fit_wait_s
from ridgewalk.calibration.processes import CalibrationError
from ridgewalk.calibration.rank_team import TeamTask, measure_team
from ridgewalk.config import ConfigError
from ridgewalk.machine import calibration_path, cpu_name, num_cores
from ridgewalk.placement.hardware import HardwareSpec, RankRates
from ridgewalk.replica.host import memory_bytes
from ridgewalk.replica.sizing import CPU_SHARE, RANK_PROCESS_BYTES

DISTURBED = 0.1
"""Of the cores, taken by other programs: from here on the figures are not the machine's."""


@dataclass(frozen=True)
class Extent:
    """How much is measured. The defaults take a minute and a half on two cores."""

    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    passes: int = 5
    samples: int = 3
    sample_s: float = 0.012
    cold_bytes: int = COLD_BYTES
    layers: tuple[int, ...] = (2, 12)
    batches: tuple[int, ...] = (1, 32)
    num_steps: int = 40


def run_calibration(out: Path | None) -> None:
    """See `ridgewalk.calibration.command.calibrate`. Raises ConfigError."""
    path, console = out or calibration_path(), Console(stderr=True, soft_wrap=True)
    _check_writable(path)
    began, busy, own = time.monotonic(), _busy_s(), _own_s()
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=num_stages(num_cores()))

        def tell(stage: str) -> None:
            progress.update(task, description=stage, advance=0 if progress.tasks[task].description == "" else 1)

        try:
            hardware = measure_machine(num_cores(), Extent(), tell)
        except CalibrationError as error:
            raise ConfigError(f"this machine could not be measured: {error}") from None
        progress.update(task, completed=num_stages(num_cores()))
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


def num_stages(cores: int) -> int:
    """Steps of progress."""
    return 2 * len(rank_counts(cores)) + (cores > 1)


def rank_counts(cores: int) -> list[int]:
    """Numbers of ranks that are measured: powers of two, and one rank a core."""
    return sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores} | {cores})


def measure_machine(cores: int, extent: Extent, tell: Callable[[str], None]) -> HardwareSpec:
    """All of it. ``tell`` is called as each stage begins.

    Raises:
        CalibrationError: a rank failed.
    """
    teams: dict[int, list[RankFigures]] = {}
    steps: dict[int, list[StepPoint]] = {}
    for ranks in rank_counts(cores):
        threads = cores // ranks
        who = f"{ranks} rank{'s' * (ranks > 1)} of {threads} thread{'s' * (threads > 1)}"
        tell(f"products, attention, collectives: {who}")
        task = TeamTask(
            ranks, threads, extent.dtypes, extent.passes, extent.samples, extent.sample_s, extent.cold_bytes
        )
        teams[ranks] = measure_team(task)
        tell(f"steps of small models: {who}")
        steps[ranks] = _steps(extent, ranks, 1)
    bare = _describe(teams, {ranks: rank_rates(figures, NO_OVERHEADS) for ranks, figures in teams.items()})
    rates = {
        ranks: rank_rates(figures, fit_overheads(steps[ranks], bare.shared_by(ranks), ranks))
        for ranks, figures in teams.items()
    }
    hardware = _describe(teams, rates)
    if cores > 1:
        tell(f"steps of small models: {cores} ranks, tensor-parallel")
        hardware = with_wait(hardware, fit_wait_s(_steps(extent, 1, cores), hardware, cores))
    return hardware


def _steps(extent: Extent, replicas: int, tp: int) -> list[StepPoint]:
    points = []
    for layers in extent.layers:
        with tempfile.TemporaryDirectory() as folder:
            task = StepsTask(layers, replicas, tp, extent.batches, extent.num_steps, extent.passes)
            points += measure_steps(task, Path(folder))
    return points


def _describe(teams: dict[int, list[RankFigures]], rates: dict[int, RankRates]) -> HardwareSpec:
    cores = max(teams)
    about = f"{cpu_name()}, {cores} core{'s' * (cores > 1)}, {memory_bytes() / 2**30:.1f} GiB"
    collectives: list[CollectiveRates] = [rank.collectives for rank in teams[cores] if rank.collectives is not None]
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
