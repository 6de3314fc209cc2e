"""`bench_routing_ranks` in virtual time: TP1 beside TP2, each placement on a core, so that many seeds take seconds.

``python -m tests.benchmarks.bench_routing_twin MODEL [--singles 2] [--rate 4] [--memory 124MiB] [--seeds 10]``. Both
ranks of TP2 share a core, so each has half of it, and so have ``--singles`` replicas of TP1 at all times, even while
another of them rests. The constants are round figures of a core with AVX-512; prompts share no prefixes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from pydantic import ByteSize, TypeAdapter

from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.load.percentile import percentile
from ridgewalk.placement.cost_model import CostModel
from ridgewalk.placement.hardware import HardwareSpec, Link
from ridgewalk.placement.memory import plan_memory
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.planning.replica_simulation import ReplicaSimulation, RequestLog
from ridgewalk.planning.simulated_router import SimulatedRouter
from ridgewalk.routing.decision import RoutingName
from ridgewalk.routing.latency_slo import NO_SLO
from ridgewalk.routing.policy import make_policy
from tests.benchmarks.bench_crossing import LIMITS
from tests.benchmarks.bench_routing import ROUTINGS, Planned
from tests.benchmarks.bench_routing_ranks import MAX_TOKENS, TTFT_S, WARM_UP, make_load

BLOCK_SIZE = 16
TEMPLATE_TOKENS, TOKENS_PER_WORD = 10, 2
"""Of a prompt."""


def core(ranks: int) -> HardwareSpec:
    """What each of so many ranks has of one core. An all-reduce waits for the other to have its turn."""
    return HardwareSpec(
        about="a core", devices_per_node=2, memory_bytes=2.0**33,
        memory_bandwidth=13e9 / ranks, flops={"bfloat16": 60e9 / ranks}, within_node=Link(1e-4, 3e9),
        bandwidth_efficiency=1.0, flops_efficiency=1.0, link_efficiency=1.0, stage_overhead_s=0.0,
        layer_overhead_s=4e-5 * ranks, step_overhead_s=8e-4, sequence_overhead_s=5e-5, device="cpu",
        host_shares_cores=True,
    )  # fmt: skip


def make_replica(spec: ModelSpec, tp: int, memory_bytes: int, ranks_on_core: int) -> ReplicaSimulation:
    """As `bench_routing_ranks` serves it."""
    mesh, seats, tokens = Mesh(tp=tp), LIMITS["max_num_seqs"], LIMITS["max_num_batched_tokens"]
    longest = LIMITS["max_model_len"]
    memory = plan_memory(spec, mesh, spec.dtype, memory_bytes, BLOCK_SIZE, tokens, seats, longest)
    config = SchedulerConfig(
        num_blocks=memory.num_blocks, block_size=BLOCK_SIZE, max_model_len=longest, max_num_seqs=seats,
        max_num_batched_tokens=tokens, max_steps_in_flight=1, counts_only=True, admission="predictive",
    )  # fmt: skip
    return ReplicaSimulation(config, CostModel(spec, mesh, core(ranks_on_core)), MAX_TOKENS)


@dataclass(frozen=True)
class Case:
    """One simulation."""

    routing: RoutingName
    shown: bool
    seed: int
    rate: float
    requests: int
    memory_bytes: int
    singles: int  # replicas of TP1


def run(spec: ModelSpec, case: Case, tpots_s: Sequence[float]) -> list[float]:
    """p99, p50, p99 of the short and of the long in seconds, goodput a second by limit, share of the long on TP1."""
    load = make_load(case.rate, 25, case.requests, case.seed)
    singles = [make_replica(spec, 1, case.memory_bytes, case.singles) for _ in range(case.singles)]
    replicas = [*singles, make_replica(spec, 2, case.memory_bytes, 2)]
    router = SimulatedRouter(make_policy(case.routing, LIMITS["max_model_len"]), replicas, NO_SLO)
    chosen = []
    for number, planned in enumerate(load):
        for replica in replicas:
            replica.run_until(planned.at_s)
        prompt = TEMPLATE_TOKENS + TOKENS_PER_WORD * planned.prompt_length
        effort = "high" if planned.is_long and case.shown else "low"
        chosen.append(router.choose(planned.at_s, number, prompt, effort))
        chosen[-1].arrive(planned.at_s, number, prompt, planned.output_length, effort)
    for replica in replicas:
        replica.run_until(math.inf)
    logs = {number: log for replica in replicas for number, log in replica.logs.items()}
    counted = range(WARM_UP, len(load))
    on_one = [chosen[number].cost.mesh.tp == 1 for number in counted if load[number].is_long]
    return [
        *_figures([load[number] for number in counted], [logs[number] for number in counted], tpots_s),
        fmean(on_one),
    ]


def _figures(load: Sequence[Planned], logs: Sequence[RequestLog], tpots_s: Sequence[float]) -> list[float]:
    latencies = [log.end_s - log.arrival_s for log in logs]
    short = [latency for latency, planned in zip(latencies, load, strict=True) if not planned.is_long]
    long = [latency for latency, planned in zip(latencies, load, strict=True) if planned.is_long]
    seconds = load[-1].at_s - load[0].at_s
    good = [sum(log.ttft_s <= TTFT_S and (log.tpot_s or 0.0) <= tpot for log in logs) / seconds for tpot in tpots_s]
    return [
        percentile(latencies, 0.99),
        percentile(latencies, 0.5),
        percentile(short, 0.99),
        percentile(long, 0.99),
        *good,
    ]


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="124MiB", help="of each rank, for weights and KV cache")
    parser.add_argument("--singles", type=int, default=2, help="replicas of one rank")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--requests", type=int, default=960)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tpot-ms", type=float, nargs="+", default=[15.0, 20.0, 25.0, 30.0])
    arguments = parser.parse_args()
    spec = ModelSpec.from_config(json.loads((arguments.model / "config.json").read_text()))
    memory, tpots_s = (
        TypeAdapter(ByteSize).validate_python(arguments.memory),
        [each / 1e3 for each in arguments.tpot_ms],
    )
    goodputs = " | ".join(f"goodput, TPOT {each:g} ms" for each in arguments.tpot_ms)
    print(f"| routing | p99, s | p50, s | p99 of the short | p99 of the long | {goodputs} | long ones on TP1 |")
    print(f"|{'---|' * (6 + len(tpots_s))}", flush=True)
    for routing in ROUTINGS:
        for shown in (True, False):
            case = Case(routing, shown, 0, arguments.rate, arguments.requests, int(memory), arguments.singles)
            rows = [run(spec, replace(case, seed=seed), tpots_s) for seed in range(arguments.seeds)]
            name = f"`{routing}`, {'shown' if shown else 'hidden'}"
            print(
                f"| {name} | {' | '.join(f'{fmean(column):.2f}' for column in zip(*rows, strict=True))} |", flush=True
            )


if __name__ == "__main__":
    main()
