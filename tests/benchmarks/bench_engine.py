"""The engine alone: no HTTP, no Ray. ``python -m tests.benchmarks.bench_engine MODEL [-tp 2]``."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine
from tests.benchmarks.workload import CONCURRENCY, NEW_TOKENS, Rate, prompts, rate, report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("-tp", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(CONCURRENCY))
    parser.add_argument("--schedule-ahead", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = EngineConfig(
        model_name=arguments.model.name,
        placement=Mesh(tp=arguments.tp).name,
        model_path=str(arguments.model),
        dtype=ModelSpec.from_folder(arguments.model).dtype,
        tp=arguments.tp,
        max_model_len=1024,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        block_size=16,
        enable_prefix_caching=False,
        max_waiting=10_000,
        schedule_ahead=arguments.schedule_ahead,
        num_blocks=64 * 32,
    )
    started = time.perf_counter()
    with OfflineEngine(config) as engine:
        print(f"ready after {time.perf_counter() - started:.1f} s")
        rates = [_measure(engine, count, arguments.repeats) for count in arguments.concurrency]
        report(f"{config.model_name} {config.placement}, offline", rates, arguments.out)
        _print_phases(engine)


def _measure(engine: OfflineEngine, concurrency: int, repeats: int) -> Rate:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    runs = []
    for repeat in range(repeats):
        load = prompts(concurrency, seed=1000 * concurrency + repeat)
        started = time.perf_counter()
        engine.generate(load, sampling)
        runs.append(concurrency * NEW_TOKENS / (time.perf_counter() - started))
    return rate(concurrency, runs)


def _print_phases(engine: OfflineEngine) -> None:
    """Where the measured steps of the last load went, on the first rank."""
    phases: defaultdict[str, float] = defaultdict(float)
    steps = [ranks[0] for ranks in engine.timings[-NEW_TOKENS // 16 :]]
    for timings in steps:
        phases["step"] += timings.seconds
        for phase, seconds in timings.phases.items():
            phases[phase] += seconds
        phases["of that, all-reduce"] += sum(c.seconds for c in timings.collectives)
    print("\nms per step: " + ", ".join(f"{name} {total / len(steps) * 1e3:.2f}" for name, total in phases.items()))


if __name__ == "__main__":
    main()
