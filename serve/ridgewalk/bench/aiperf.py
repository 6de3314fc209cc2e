"""One load, sent and timed by aiperf."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ridgewalk.bench.client_records import SESSION, ClientRequest, RecordsError, read_records
from ridgewalk.bench.endpoint import Endpoint
from ridgewalk.bench.processes import end_process_tree
from ridgewalk.bench.workload import RequestShape
from ridgewalk.zoo import zoo_path

LOOK_EVERY_S = 0.5
RECORDS = "profile_export.jsonl"
KEY_VARIABLE = "RIDGEWALK_BENCH_KEY"
_WITH_KEY = (
    "import os, runpy, sys; "
    f"sys.argv = [*sys.argv[1:], '--api-key', os.environ.pop('{KEY_VARIABLE}')]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Runs a script with the key as its last option: everybody on the machine can read a process's command line."""


class AiperfFailed(RuntimeError):
    """aiperf ended without the records of all requests; carries its last words."""


@dataclass(frozen=True)
class Load:
    """How requests are sent: closed loop by ``concurrency``, open loop by ``rate``, or by the shapes' own times."""

    concurrency: int | None = None
    rate: float | None = None  # requests per second, Poisson arrivals

    @property
    def label(self) -> str:
        """A few words."""
        if self.concurrency is not None:
            return f"concurrency {self.concurrency}"
        return "as in the trace" if self.rate is None else f"{self.rate:g} requests/s"


def write_input(path: Path, prompts: Sequence[str], shapes: Sequence[RequestShape], timed: bool) -> None:
    """aiperf's `single_turn` file: a line for each request, which is sent as it stands."""
    lines = []
    for index, (prompt, shape) in enumerate(zip(prompts, shapes, strict=True)):
        line: dict[str, object] = {
            "session_id": f"{SESSION}{index}",
            "text": prompt,
            "output_length": shape.output_length,
        }
        if timed:
            line["timestamp"] = shape.timestamp_ms
        lines.append(msgspec.json.encode(line))
    path.write_bytes(b"\n".join(lines) + b"\n")


def aiperf_command(
    program: Path, endpoint: Endpoint, load: Load, input_file: Path, count: int, folder: Path, *, seed: int, force: bool
) -> list[str]:
    """The command line, without the endpoint's key."""
    command = [
        *([] if endpoint.api_key is None else [*_interpreter(program), "-c", _WITH_KEY]),
        str(program), "profile",
        "--model", endpoint.model,
        "--url", endpoint.url,
        "--endpoint-type", "chat",
        "--streaming",
        "--use-server-token-count",
        # Counts are the server's and prompts are ours, so any tokenizer will do that is at hand without a network.
        "--tokenizer", str(zoo_path("demo-dense")),
        "--input-file", str(input_file),
        "--custom-dataset-type", "single_turn",
        "--dataset-sampling-strategy", "sequential",
        "--request-count", str(count),
        "--random-seed", str(seed),
        "--ui-type", "none",
        "--no-gpu-telemetry", "--no-server-metrics",
        "--output-artifact-dir", str(folder),
    ]  # fmt: skip
    if force:
        command += ["--extra-inputs", "ignore_eos:true"]
    if load.concurrency is not None:
        return [*command, "--concurrency", str(load.concurrency)]
    if load.rate is not None:
        return [*command, "--request-rate", str(load.rate), "--arrival-pattern", "poisson"]
    return [*command, "--fixed-schedule", "--fixed-schedule-auto-offset"]


def run_aiperf(
    command: Sequence[str], folder: Path, count: int, on_progress: Callable[[int], None], api_key: str | None
) -> list[ClientRequest]:
    """Run it to its end, and end it with all its processes when interrupted.

    Args:
        command: of `aiperf_command`.
        folder: the artifacts' folder that the command names.
        count: requests that it sends.
        on_progress: called now and then with the number of requests done.
        api_key: for the endpoint.

    Raises:
        AiperfFailed: it did not send them all.
    """
    # Every record is written when it comes, not a hundred at a time: the progress is read off the file.
    environment = {**os.environ, "AIPERF_RECORD_EXPORT_BATCH_SIZE": "1"}
    environment.pop("HF_HUB_OFFLINE", None)  # with it aiperf looks for a cached tokenizer and not for the local folder
    if api_key:
        environment[KEY_VARIABLE] = api_key
    log = folder / "output.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True,
            env=environment,
            preexec_fn=os.setpgrp,  # a terminal's Ctrl-C is ours to pass on; why no session: launch/prometheus.py
        )  # fmt: skip
        try:
            while True:
                try:
                    process.wait(LOOK_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    on_progress(_num_lines(folder / RECORDS))
        finally:
            end_process_tree(process)
    try:
        requests = read_records(folder / RECORDS)
    except RecordsError as error:
        raise AiperfFailed(f"{error}; its last words: {_last_words(log)}") from None
    on_progress(len(requests))
    failures = [request.error for request in requests if request.error is not None]
    if failures and len(failures) == len(requests):
        raise AiperfFailed(f"all {len(failures)} requests failed: {failures[0]}")
    if process.returncode or len(requests) < count:
        raise AiperfFailed(
            f"aiperf ended with status {process.returncode} after {len(requests)} of {count} requests; its last words: "
            f"{_last_words(log)}"
        )
    return requests


def _interpreter(program: Path) -> list[str]:
    """The Python that runs a console script: that of its first line, or the one beside it."""
    words = program.open("rb").readline().decode(errors="replace").removeprefix("#!").split()
    return words if words and "python" in words[-1] else [str(program.parent / "python")]


def _num_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _last_words(log: Path, most: int = 600) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "ERROR" in line] or [log.read_text()]
    return " ".join(" ".join(lines).split())[-most:] or "none"
