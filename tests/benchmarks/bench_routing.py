"""Skewed load on mixed placements, simulated: a tenth of the requests write twenty times more than the others.

``python -m tests.benchmarks.bench_routing [--placement DP4+TP4] [--rate 20] [--short 200] [--seeds 0 1] [--ask-ms 20]``

Arrivals are a Poisson process. With the class *shown* the long send ``reasoning_effort`` high and the others low;
*hidden*, all send the same. Every request's ``max_tokens`` is that of the longest. Admission is predictive, steps are
scheduled ahead (policy ``ridgewalk``): only the routing differs. With ``--ask-ms`` every request asks for the limits of
goodput, with that TPOT, and `kv_growth` is run once more for it. A figure is the mean over the seeds, with its range.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean

from ridgewalk.load.percentile import percentile
from ridgewalk.placement.data_files import shipped_path
from ridgewalk.placement.hardware import find_hardware
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.planning.policy import POLICIES
from ridgewalk.planning.shape import parse_placement
from ridgewalk.planning.simulator import Arrival, Outcome, Scene, simulate
from ridgewalk.routing.decision import RoutingName
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo

LONG_SHARE, LONG_RATIO = 0.1, 20
SIGMA = 0.4
"""Of the lognormal lengths of outputs within a class; prompts have a median of 400 tokens and 0.6."""

TTFT_S = 2.0
TPOTS_S = (0.020, 0.030)
"""Limits of goodput: one that a TP1 replica of 32B just keeps while it has little to do, and an easier one."""

ROUTINGS: tuple[RoutingName, ...] = ("round_robin", "least_loaded", "kv_growth")


@dataclass(frozen=True)
class Case:
    """One simulation."""

    model: str
    hardware: str
    placement: str
    rate: float
    short: int  # median output of the short
    requests: int
    routing: RoutingName
    shown: bool
    slo: LatencySlo
    seed: int


@dataclass(frozen=True)
class Figures:
    """What came of it. Seconds, and requests per second."""

    p99_s: float
    p50_s: float
    short_p99_s: float
    long_p99_s: float
    goodputs: tuple[float, ...]  # by `TPOTS_S`
    preemptions: int


@dataclass(frozen=True)
class Planned:
    """One request of a skewed load."""

    at_s: float
    prompt_length: int
    output_length: int
    is_long: bool


def skewed_load(
    rate: float, short: int, requests: int, seed: int, prompt: int, prompt_sigma: float
) -> Iterator[Planned]:
    """The same requests whatever the routing, and whether the class shows or not. ``prompt``: the median length."""
    rng, now = random.Random(seed), 0.0
    for _ in range(requests):
        now += rng.expovariate(rate)
        is_long = rng.random() < LONG_SHARE
        median = short * (LONG_RATIO if is_long else 1)
        output = round(median * rng.lognormvariate(0, SIGMA))
        yield Planned(now, round(prompt * rng.lognormvariate(0, prompt_sigma)), output, is_long)


def make_load(case: Case) -> tuple[Arrival, ...]:
    """As the simulator takes it."""
    return tuple(
        Arrival(
            each.at_s,
            max(16, each.prompt_length),
            max(1, each.output_length),
            ("high" if each.is_long else "low") if case.shown else "",
        )
        for each in skewed_load(case.rate, case.short, case.requests, case.seed, prompt=400, prompt_sigma=0.6)
    )


def run(case: Case) -> Figures:
    """Simulate one case."""
    path = shipped_path("models", case.model)
    assert path is not None, f"--model: there is no {case.model}"
    spec = ModelSpec.from_config(json.loads(path.read_text()))
    policy = replace(POLICIES["ridgewalk"], routing=case.routing)
    scene = Scene(spec, find_hardware(case.hardware), policy, make_load(case), case.slo)
    return _figures(case, simulate(scene, parse_placement(case.placement)), scene.arrivals[-1].time_s)


def _figures(case: Case, outcome: Outcome, arriving_s: float) -> Figures:
    """Goodput is the share of requests that kept the limits, of the rate at which they came: how long the last ones
    take to drain is in the latencies."""
    limit = case.short * LONG_RATIO / 4  # between the two humps
    latencies = [log.end_s - log.arrival_s for log in outcome.logs]
    short = [log.end_s - log.arrival_s for log in outcome.logs if log.output_length < limit]
    long = [log.end_s - log.arrival_s for log in outcome.logs if log.output_length >= limit]
    return Figures(
        p99_s=percentile(latencies, 0.99),
        p50_s=percentile(latencies, 0.5),
        short_p99_s=percentile(short, 0.99),
        long_p99_s=percentile(long, 0.99),
        goodputs=tuple(
            outcome.goodput_per_s(LatencySlo(TTFT_S, tpot)) * outcome.makespan_s / arriving_s for tpot in TPOTS_S
        ),
        preemptions=outcome.preemptions,
    )


def _cell(values: Sequence[float], digits: int = 1) -> str:
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _row(name: str, seeds: Sequence[Figures]) -> str:
    cells = [
        _cell([each.p99_s for each in seeds]),
        *(_cell([each.goodputs[index] for each in seeds], 2) for index in range(len(TPOTS_S))),
        _cell([each.p50_s for each in seeds]),
        _cell([each.short_p99_s for each in seeds]),
        _cell([each.long_p99_s for each in seeds]),
        str(sum(each.preemptions for each in seeds)),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[str, list[Case]]]:
    asked = [NO_SLO, *(LatencySlo(TTFT_S, limit / 1e3) for limit in arguments.ask_ms)]
    for shown, routing, slo in product((True, False), arguments.routings, asked):
        if slo is NO_SLO or routing == "kv_growth":
            asking = "" if slo is NO_SLO else f", {slo.tpot_s * 1e3:g} ms asked for"
            yield f"{'shown' if shown else 'hidden'}, `{routing}`{asking}", [
                Case(
                    arguments.model, arguments.hardware, arguments.placement, arguments.rate, arguments.short,
                    arguments.requests, routing, shown, slo, seed,
                )
                for seed in arguments.seeds
            ]  # fmt: skip


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="r1-distill-qwen-32b")
    parser.add_argument("--hardware", default="8xh200")
    parser.add_argument("--placement", default="DP4+TP4")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--short", type=int, default=200, help="median output tokens of nine requests in ten")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--ask-ms", type=float, nargs="*", default=[], help="TPOT limits that requests ask for")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    print(
        f"{arguments.model} as {arguments.placement}: {arguments.requests} requests at {arguments.rate:g} a second, "
        f"short {arguments.short}, {len(arguments.seeds)} seeds\n"
    )
    limits = " | ".join(f"goodput, TPOT {tpot * 1e3:.0f} ms" for tpot in TPOTS_S)
    print(f"| class, routing | p99 e2e, s | {limits} | p50, s | p99 of the short | p99 of the long | preemptions |")
    print(f"|{'---|' * (6 + len(TPOTS_S))}")
    with ProcessPoolExecutor(arguments.processes) as pool:
        for name, cases in _cases(arguments):
            print(_row(name, list(pool.map(run, cases))), flush=True)


if __name__ == "__main__":
    main()
