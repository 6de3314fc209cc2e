"""The capacity cliff for real: 2 x TP1 against TP2, each rank with the same small memory, more and more at once.

``python -m tests.benchmarks.bench_crossing MODEL [--memory 125MiB] [--pictures docs]`` serves MODEL in each placement
under each admission, one after the other, and lets `ridgewalk bench` load it: `reasoning`, scaled down. It prints a
table, and draws the placements under the first admission over each other, and both admissions of the first placement,
as `bench --compare` does.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ridgewalk.bench.plots import sweep_plot
from ridgewalk.bench.report import Distribution, Point, Report, Service, read_report
from ridgewalk.replica.host import free_port
from tests.monitoring.live_service import RIDGEWALK, live_service

PLACEMENTS: Mapping[str, Mapping[str, int]] = {"2 x TP1": {"replicas": 2}, "TP2": {"tensor_parallel_size": 2}}
ADMISSIONS = ("prompt_only", "predictive")
LIMITS = {"max_model_len": 1024, "max_num_seqs": 64, "max_num_batched_tokens": 512}


def configuration(
    model: Path, placements: Sequence[Mapping[str, Any]], memory: str, **options: object
) -> dict[str, Any]:
    """The model in these placements. Every rank has so much memory, no swap space beside it, and one thread."""
    every = [{**placement, "memory": memory, "threads_per_rank": 1} for placement in placements]
    served = {"model": str(model), "name": model.name, "swap_space": 0, **LIMITS, **options, "placements": every}
    return {"host": "127.0.0.1", "port": free_port("127.0.0.1"), "models": [served]}


def measure(config: Mapping[str, Any], folder: Path, arguments: argparse.Namespace) -> Report:
    """Serve, load, and read the report."""
    folder.mkdir(parents=True, exist_ok=True)
    with live_service(folder, config) as service:
        subprocess.run(
            [
                *RIDGEWALK, "bench", "--profile", "reasoning", "--url", service.url,
                "--tokenizer", str(arguments.model),
                "--scale", str(arguments.scale), "--concurrency", arguments.concurrency,
                "--requests", str(arguments.requests), "--slo-ttft", "5s", "--slo-itl", "200ms", "--out", str(folder),
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return read_report(folder / "report.json")


def print_table(reports: Mapping[str, Report]) -> None:
    """A row per figure and service, a column per concurrency."""
    points = next(iter(reports.values())).points
    print(f"| | {' | '.join(f'{point.concurrency}' for point in points)} |\n|---{'|---' * len(points)}|")
    for title, cell in ROWS:
        for name, report in reports.items():
            print(f"| {name}: {title} | {' | '.join(cell(point) for point in report.points)} |")


def _seconds(of: Distribution | None, percentile: str, per_second: float) -> str:
    assert of is not None
    return f"{getattr(of, percentile) / per_second:.2g} s"


def _service(point: Point) -> Service:
    assert point.service is not None
    return point.service


ROWS: Sequence[tuple[str, Callable[[Point], str]]] = (
    ("output tokens/s", lambda point: f"{point.client.output_tokens_per_s:.0f}"),
    ("time to first token, p50", lambda point: _seconds(point.client.ttft_ms, "p50", 1e3)),
    ("inter-token latency, p50", lambda point: _seconds(point.client.itl_ms, "p50", 1e3)),
    ("end to end, p99", lambda point: _seconds(point.client.e2e_s, "p99", 1)),
    ("within the SLO", lambda point: f"{point.client.good_share:.0%}"),
    ("KV cache used, mean", lambda point: f"{_service(point).kv_usage_mean:.0%}"),
    ("preemptions", lambda point: f"{_service(point).num_preemptions:.0f}"),
    ("computed twice", lambda point: f"{_service(point).recompute_tax or 0:.1%}"),
)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="125MiB", help="of each rank, for weights and KV cache")
    parser.add_argument("--scale", type=float, default=0.05)
    parser.add_argument("--concurrency", default="4,8,16,32,64")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--admissions", nargs="+", choices=ADMISSIONS, default=ADMISSIONS)
    parser.add_argument("--reports", type=Path, help="a folder to keep them in")
    parser.add_argument("--pictures", type=Path, help="a folder for crossing.svg and cliff.svg")
    arguments = parser.parse_args()
    reports: dict[tuple[str, str], Report] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for admission, placement in itertools.product(arguments.admissions, PLACEMENTS):
            config = configuration(arguments.model, [PLACEMENTS[placement]], arguments.memory, admission=admission)
            name = f"{placement.replace(' ', '')}-{admission}"
            reports[placement, admission] = measure(config, (arguments.reports or Path(temporary)) / name, arguments)
            print(f"{placement}, {admission}: measured", file=sys.stderr, flush=True)
    print_table({f"{placement}, {admission}": report for (placement, admission), report in reports.items()})
    if arguments.pictures:
        admission, placement = arguments.admissions[0], next(iter(PLACEMENTS))
        crossing = [(name, reports[name, admission]) for name in PLACEMENTS]
        cliff = [(name, reports[placement, name]) for name in arguments.admissions]
        for name, pair in (("crossing", crossing), ("cliff", cliff)):
            (arguments.pictures / f"{name}.svg").write_text(sweep_plot(pair))


if __name__ == "__main__":
    main()
