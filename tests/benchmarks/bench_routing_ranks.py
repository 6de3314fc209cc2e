"""Skewed load on mixed placements, for real: a small load like `bench_routing`'s, over HTTP on this machine's ranks.

``python -m tests.benchmarks.bench_routing_ranks MODEL [--rate 2] [--short 25] [--memory 130MiB]`` serves MODEL as TP1
beside TP2, once for each routing policy, and sends each the very same requests at the same Poisson arrivals. Each
placement has a core of its own for its ranks; with ``--cores shared`` all ranks have the same ones. ``--singles 2`` are
two replicas of TP1, which then slow each other down.

All send the same ``max_tokens``: a request ends where ``min_tokens`` stops forbidding an end that ``logit_bias`` wants,
and neither router nor scheduler reads those. *Shown*: the long send ``reasoning_effort`` high, the others low.
*Hidden*: all send the same. Every policy gets both loads, for admission sees the class too. With ``--ask-ms``
`kv_growth` is also run with every request asking for first tokens within 2 s and that TPOT, by headers. The first
`WARM_UP` requests count nowhere: what a policy learns, it learns from them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from ridgewalk.api.slo_headers import TPOT_HEADERS, TTFT_HEADERS
from ridgewalk.load.percentile import percentile
from ridgewalk.load.streaming_client import Answer, stream_completion
from ridgewalk.routing.decision import RoutingName
from tests.benchmarks.bench_crossing import configuration
from tests.benchmarks.bench_routing import ROUTINGS, SIGMA, Planned, skewed_load
from tests.monitoring.live_service import LiveService, live_service

WARM_UP = 60
TTFT_S = 2.0
MAX_TOKENS = 800
"""Of every request, whatever it writes."""


def placements(singles: int, cores: str) -> list[Mapping[str, object]]:
    """What is served: replicas of one rank, and one of two."""
    single, pair = {"replicas": singles}, {"tensor_parallel_size": 2}
    return [single, pair] if cores == "shared" else [{**single, "cpus": 0}, {**pair, "cpus": 1}]


@dataclass(frozen=True)
class Mode:
    """What differs between two runs of one load."""

    routing: RoutingName
    shown: bool
    ask_ms: float | None = None  # the TPOT that requests ask for

    @property
    def name(self) -> str:
        """For the table."""
        asked = [f"{self.ask_ms:g} ms asked for"] if self.ask_ms else []
        return ", ".join([f"`{self.routing}`", "shown" if self.shown else "hidden", *asked])


@dataclass(frozen=True)
class Done:
    """What its client saw."""

    planned: Planned
    answer: Answer

    @property
    def tpot_s(self) -> float:
        """Mean time per further token."""
        return (self.answer.total_time - self.answer.time_to_first_token) / max(self.answer.completion_tokens - 1, 1)


def make_load(rate: float, short: int, requests: int, seed: int) -> list[Planned]:
    """As the model's context can hold it."""
    return [
        replace(
            each,
            prompt_length=max(4, each.prompt_length),
            output_length=min(max(2, each.output_length), MAX_TOKENS),
        )
        for each in skewed_load(rate, short, requests, seed, prompt=20, prompt_sigma=SIGMA)
    ]


async def drive(url: str, model: str, eos: int, load: Sequence[Planned], mode: Mode) -> list[Done]:
    """Send each at its time; all that came after the warm-up."""
    asking = {} if mode.ask_ms is None else {TTFT_HEADERS[0]: f"{TTFT_S * 1e3:g}", TPOT_HEADERS[0]: f"{mode.ask_ms:g}"}

    async def one(session: aiohttp.ClientSession, planned: Planned) -> Done:
        await asyncio.sleep(planned.at_s)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": " ".join(str(n) for n in range(planned.prompt_length))}],
            "max_tokens": MAX_TOKENS,
            "min_tokens": planned.output_length - 1,  # the token that ends it is one more
            "logit_bias": {str(eos): 100},
            "temperature": 0,
            "reasoning_effort": "high" if planned.is_long and mode.shown else "low",
        }
        answer = await stream_completion(session, f"{url}/v1/chat/completions", body)
        assert answer.completion_tokens == planned.output_length, (answer.completion_tokens, planned)
        return Done(planned, answer)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=asking) as session:
        done = await asyncio.gather(*(one(session, planned) for planned in load))
    return done[WARM_UP:]


def row(name: str, done: Sequence[Done], tpots_s: Sequence[float], service: LiveService) -> str:
    """A line of the table. Goodput: the share that kept the limits, of the rate at which they came."""
    latencies = [each.answer.total_time for each in done]
    rate = len(done) / (done[-1].planned.at_s - done[0].planned.at_s)
    good = [
        rate * sum(each.answer.time_to_first_token <= TTFT_S and each.tpot_s <= tpot for each in done) / len(done)
        for tpot in tpots_s
    ]
    short = [each.answer.total_time for each in done if not each.planned.is_long]
    long = [each.answer.total_time for each in done if each.planned.is_long]
    preemptions = service.query("sum(ridgewalk_num_preemptions_total)")[0]["value"][1]
    seconds = percentile(latencies, 0.99), percentile(latencies, 0.5), percentile(short, 0.99), percentile(long, 0.99)
    cells = [*(f"{each:.2f}" for each in seconds), *(f"{each:.2f}" for each in good), preemptions]
    return f"| {name} | {' | '.join(cells)} |"


def modes(routings: Sequence[RoutingName], ask_ms: Sequence[float]) -> list[Mode]:
    """All that is run for each load."""
    return [
        Mode(routing, shown, ask)
        for routing in routings
        for shown in (True, False)
        for ask in (None, *(ask_ms if routing == "kv_growth" else []))
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="130MiB", help="of each rank, for weights and KV cache")
    parser.add_argument("--singles", type=int, default=1, help="replicas of one rank")
    parser.add_argument("--cores", choices=["apart", "shared"], default="apart", help="between the placements")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--short", type=int, default=25, help="median output tokens of nine requests in ten")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tpot-ms", type=float, nargs="+", default=[25.0, 40.0])
    parser.add_argument("--ask-ms", type=float, nargs="*", default=[], help="TPOT limits that requests ask for")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    arguments = parser.parse_args()
    if arguments.requests < 2 * WARM_UP:
        parser.error(f"--requests: {WARM_UP} of them are the warm-up; at least {2 * WARM_UP} are needed")
    eos = json.loads((arguments.model / "config.json").read_text())["eos_token_id"]
    tpots_s = [each / 1e3 for each in arguments.tpot_ms]
    goodputs = " | ".join(f"goodput, TPOT {each:g} ms" for each in arguments.tpot_ms)
    print(f"| routing | p99, s | p50, s | p99 of the short | p99 of the long | {goodputs} | preemptions, of all |")
    print(f"|{'---|' * (6 + len(tpots_s))}", flush=True)
    for seed in arguments.seeds:
        load = make_load(arguments.rate, arguments.short, arguments.requests, seed)
        for mode in modes(arguments.routings, arguments.ask_ms):
            shapes = placements(arguments.singles, arguments.cores)
            config = configuration(arguments.model, shapes, arguments.memory, routing=mode.routing)
            with tempfile.TemporaryDirectory() as folder, live_service(Path(folder), config) as service:
                done = asyncio.run(drive(service.url, arguments.model.name, eos, load, mode))
                print(row(f"{mode.name}, seed {seed}", done, tpots_s, service), flush=True)


if __name__ == "__main__":
    main()
