"""The engine alone: no HTTP, no Ray.

``python -m tests.benchmarks.bench_engine MODEL [-tp 2] [-pp 2] [-dp 2 --enable-expert-parallel]``
"""

from __future__ import annotations

import argparse
import time

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler_config import MEASURE_EVERY
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec, UnsupportedModelError, validate_mesh
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine
from tests.benchmarks.step_phases import print_phases
from tests.benchmarks.workload import NEW_TOKENS, Rate, load_parser, prompts, rate, report


def main() -> None:
    """Measure and print."""
    parser = load_parser(__doc__)
    parser.add_argument("-pp", type=int, default=1)
    parser.add_argument("-dp", type=int, default=1, help="attention groups; needs --enable-expert-parallel")
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--threads-per-rank", type=int)
    parser.add_argument("--schedule-ahead", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    mesh = Mesh(arguments.tp, arguments.pp, arguments.dp, arguments.enable_expert_parallel)
    spec = ModelSpec.from_folder(arguments.model)
    try:
        validate_mesh(spec, mesh)
    except UnsupportedModelError as error:
        parser.error(str(error))
    config = EngineConfig(
        model_name=arguments.model.name,
        placement=mesh.name,
        model_path=str(arguments.model),
        dtype=spec.dtype,
        tp=mesh.tp,
        pp=mesh.pp,
        dp=mesh.dp,
        expert_parallel=mesh.expert_parallel,
        threads_per_rank=arguments.threads_per_rank,
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
        print_phases(engine.timings[-NEW_TOKENS // MEASURE_EVERY :], mesh)


def _measure(engine: OfflineEngine, concurrency: int, repeats: int) -> Rate:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    runs = []
    for repeat in range(repeats):
        load = prompts(concurrency, seed=1000 * concurrency + repeat)
        started = time.perf_counter()
        engine.generate(load, sampling)
        runs.append(concurrency * NEW_TOKENS / (time.perf_counter() - started))
    return rate(concurrency, runs)


if __name__ == "__main__":
    main()
