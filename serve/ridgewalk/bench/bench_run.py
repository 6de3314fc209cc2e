"""A run: warm up, load once for each point, join client and service, write the report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from ridgewalk import __version__
from ridgewalk.bench.aiperf import AiperfFailed, Load, aiperf_command, run_aiperf, write_input
from ridgewalk.bench.client_records import client_figures
from ridgewalk.bench.endpoint import Endpoint, warm_up
from ridgewalk.bench.environment import Aiperf
from ridgewalk.bench.findings import findings
from ridgewalk.bench.options import Work
from ridgewalk.bench.prompts import write_prompts
from ridgewalk.bench.report import SCHEMA_VERSION, Point, Report, Slo, Target, Workload
from ridgewalk.bench.service_window import ServiceSampler, service_figures
from ridgewalk.bench.statistics import distribution
from ridgewalk.launch.stopping import Stopped

FAILED, INTERRUPTED = 1, 130


@dataclass(frozen=True)
class Run:
    """What came of a run: all its loads, or those before one that did not come to its end."""

    report: Report
    missing: str | None = None  # says which loads the report lacks, and why
    status: int = 0  # for the shell


def run_bench(
    endpoint: Endpoint,
    tokenizer: Tokenizer,
    work: Work,
    loads: Sequence[Load],
    slo: Slo,
    aiperf: Aiperf,
    console: Console,
) -> Run:
    """Load the endpoint once for each of ``loads``.

    The points of a sweep ask for the same lengths in the same order, in other words: a prefix cache that remembers one
    point's prompts does not help the next.
    When a load fails or is interrupted after others were complete, the report has those.

    Raises:
        AiperfFailed, ConfigError: the first load could not be sent.
        Stopped: it was interrupted.
    """
    template = warm_up(endpoint, tokenizer, work.seed, force=work.force_lengths)
    points: list[Point] = []
    missing, status = None, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        try:
            for number, load in enumerate(loads):
                task = progress.add_task(load.label, total=len(work.requests))
                prompts = write_prompts(
                    tokenizer,
                    [max(1, request.input_length - template) for request in work.requests],
                    seed=work.seed * 1_000 + number,
                )

                def show(done: int, task: TaskID = task) -> None:
                    progress.update(task, completed=done)

                points.append(_point(endpoint, work, load, prompts, slo, aiperf.program, show))
        except (AiperfFailed, Stopped) as error:
            if not points:
                raise
            missing = _missing(loads[len(points) :], error)
            status = INTERRUPTED if isinstance(error, Stopped) else FAILED
    report = Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        ridgewalk_version=__version__,
        aiperf_version=aiperf.version,
        target=Target(
            url=endpoint.url,
            model=endpoint.model,
            placement=endpoint.placement,
            version=endpoint.version,
            is_ridgewalk=endpoint.is_ridgewalk,
            max_model_len=endpoint.max_model_len,
        ),
        workload=_workload(work),
        slo=slo,
        points=points,
        findings=findings(points, is_ridgewalk=endpoint.is_ridgewalk, missing=missing),
    )
    return Run(report, missing, status)


def _missing(loads: Sequence[Load], why: AiperfFailed | Stopped) -> str:
    first, *later = (load.label for load in loads)
    after = f", and so are those after it ({', '.join(later)})" if later else ""
    if isinstance(why, Stopped):
        return f"The load at {first} was interrupted and is missing here{after}."
    return f"The load at {first} failed and is missing here{after}: {why}"


def _point(
    endpoint: Endpoint,
    work: Work,
    load: Load,
    prompts: Sequence[str],
    slo: Slo,
    aiperf: Path,
    show: Callable[[int], None],
) -> Point:
    count = len(work.requests)
    sampler = ServiceSampler(endpoint.url, endpoint.headers) if endpoint.is_ridgewalk else None
    with tempfile.TemporaryDirectory(prefix="ridgewalk-bench-") as name, sampler or nullcontext():
        folder = Path(name)
        input_file = folder / "requests.jsonl"
        timed = load.concurrency is None and load.rate is None
        write_input(input_file, prompts, work.requests, timed)
        command = aiperf_command(
            aiperf, endpoint, load, input_file, count, folder, seed=work.seed, force=work.force_lengths
        )
        requests = run_aiperf(command, folder, count, show, endpoint.api_key)
    service = None
    if sampler is not None:
        start, end = min(request.start for request in requests), max(request.end for request in requests)
        service = service_figures(sampler.samples, start, end, endpoint.model, sampler.num_failed)
    return Point(
        label=load.label,
        concurrency=load.concurrency,
        rate=load.rate,
        client=client_figures(requests, work.requests, slo, forced=work.force_lengths),
        service=service,
    )


def _workload(work: Work) -> Workload:
    inputs = distribution([request.input_length for request in work.requests])
    outputs = distribution([request.output_length for request in work.requests])
    assert inputs is not None  # there is at least one request
    assert outputs is not None
    return Workload(
        name=work.name,
        about=work.about,
        scale=work.scale,
        seed=work.seed,
        num_requests=len(work.requests),
        input_length=inputs,
        output_length=outputs,
        lengths_forced=work.force_lengths,
    )
