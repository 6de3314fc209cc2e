"""Admission without a crystal ball: 64 requests that all send the same ``max_tokens``, in KV for 8,192 tokens.

``python -m tests.benchmarks.bench_admission DIR --policy prompt_only|predictive|oracle --rounds 2 [--swap-tokens 0]``

How long each request writes is known to its rank alone: the executor here turns the token at that length into the stop
token. The first round is cold: `predictive` has seen nothing. The second goes on with what it learned.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ridgewalk.engine.executor import Executor
from ridgewalk.engine.predictive_admission import PredictiveAdmission, make_admission
from ridgewalk.engine.scheduler import AttentionGroup
from ridgewalk.engine.step import NO_TOKEN, RankTimings, StepInput, StepOutput
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine
from tests.benchmarks import admission_load
from tests.benchmarks.admission_load import STOP_TOKEN, Lengths, Oracle


class HiddenLengths:
    """An executor around another, whose sequences stop where `Lengths` says."""

    def __init__(self, inner: Executor, lengths: Lengths) -> None:
        self._inner = inner
        self._lengths = lengths
        self._open: deque[StepInput] = deque()
        self.num_steps = 0

    def submit(self, step: StepInput) -> None:
        self._lengths.follow(step)
        self._open.append(step)
        self.num_steps += 1
        self._inner.submit(step)

    def wait(self, timeout_s: float) -> None:
        self._inner.wait(timeout_s)

    def collect(self) -> list[StepOutput]:
        return [self._cut(output) for output in self._inner.collect()]

    def take_timings(self) -> list[list[RankTimings]]:
        return self._inner.take_timings()

    def close(self) -> None:
        self._inner.close()

    def _cut(self, output: StepOutput) -> StepOutput:
        groups = [
            msgspec.structs.replace(
                group, token_ids=[_cut(token, stop) for token, stop in zip(group.token_ids, stops, strict=True)]
            )
            for group, stops in zip(output.groups, self._lengths.stops(self._open.popleft()), strict=True)
        ]
        return StepOutput(output.step_id, groups)


def _cut(token_id: int, stop: bool) -> int:
    if token_id == NO_TOKEN:
        return token_id
    return STOP_TOKEN if stop else max(token_id, STOP_TOKEN + 1)


class TimedAdmission(PredictiveAdmission):
    """Adds up what its forecasts cost."""

    seconds = 0.0

    def prepare(self, groups: Sequence[AttentionGroup], step: int) -> None:
        started = time.perf_counter()
        super().prepare(groups, step)
        self.seconds += time.perf_counter() - started

    def admits(self, *asked: object) -> bool:
        started = time.perf_counter()
        admitted = super().admits(*asked)  # type: ignore[arg-type]
        self.seconds += time.perf_counter() - started
        return admitted


@dataclass(frozen=True)
class Round:
    """What one load cost."""

    seconds: float
    processor_seconds: float  # of the rank and the scheduler: the same whatever else the machine does
    num_preemptions: int
    recomputed_tokens: int
    generation_tokens: int
    steps: int
    admission_seconds: float

    def row(self, name: str) -> str:
        """A line of the table."""
        return (
            f"| {name} | {self.generation_tokens / self.seconds:.0f} | {self.num_preemptions} "
            f"| {self.recomputed_tokens} ({self.recomputed_tokens / self.generation_tokens:.1%}) | {self.steps} "
            f"| {self.seconds:.1f} | {self.processor_seconds:.1f} "
            f"| {self.admission_seconds / self.steps * 1e6:.0f} us |"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--policy", choices=["prompt_only", "predictive", "oracle"], required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--swap-tokens", type=int, help="of swap space, on the host; default: as shipped")
    parser.add_argument("--requests", type=int, default=admission_load.NUM_REQUESTS, help="of a round")
    arguments = parser.parse_args()
    if arguments.policy == "oracle" and arguments.swap_tokens:
        parser.error("--swap-tokens: the oracle preempts nobody")
    limits = admission_load.scheduler_config()
    spec = ModelSpec.from_folder(arguments.model)
    config = EngineConfig(
        model_name=arguments.model.name, placement="TP1", model_path=str(arguments.model), dtype=spec.dtype,
        max_model_len=limits.max_model_len, max_num_seqs=limits.max_num_seqs, block_size=limits.block_size,
        max_num_batched_tokens=limits.max_num_batched_tokens, num_blocks=limits.num_blocks, max_waiting=10_000,
        admission="prompt_only" if arguments.policy == "prompt_only" else "predictive",
        swap_space=_swap_space(arguments.policy, arguments.swap_tokens, spec),
    )  # fmt: skip
    loads = [
        admission_load.make_load(arguments.seed + number, count=arguments.requests)
        for number in range(arguments.rounds)
    ]
    lengths = Lengths(request for load in loads for request in load)
    with OfflineEngine(config) as engine:
        engine.core.executor = engine.executor = HiddenLengths(engine.executor, lengths)
        scheduler = engine.core.scheduler
        if arguments.policy == "oracle":
            scheduler.admission = PredictiveAdmission(scheduler.config, Oracle(lengths), margin=0.0, growth=1.0)
        elif arguments.policy == "predictive":
            scheduler.admission = TimedAdmission(scheduler.config)
        else:
            scheduler.admission = make_admission(limits)
        print("| policy | tokens/s | preemptions | recomputed | steps | seconds | processor s | admission, a step |")
        print("|---|---|---|---|---|---|---|---|")
        for number, load in enumerate(loads):
            tokens = scheduler.config.num_swap_blocks * scheduler.config.block_size
            swapped = f", {tokens:,} tokens of swap space" if tokens else ""
            print(_run(engine, load).row(f"{arguments.policy}, round {number + 1}{swapped}"), flush=True)


def _swap_space(policy: str, tokens: int | None, spec: ModelSpec) -> int | None:
    if policy == "oracle":  # it preempts nobody
        return 0
    return None if tokens is None else tokens * sum(spec.kv_bytes_per_token_per_stage(Mesh(), spec.dtype))


def _run(engine: OfflineEngine, load: list[admission_load.HiddenLength]) -> Round:
    scheduler = engine.core.scheduler
    before = msgspec.json.decode(msgspec.json.encode(scheduler.counters), type=dict[str, int])
    spent, started = getattr(scheduler.admission, "seconds", 0.0), (time.perf_counter(), time.process_time())
    requests = engine.generate(
        [each.prompt_token_ids for each in load], [admission_load.sampling(number) for number in range(len(load))]
    )
    seconds, processor_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    assert [request.num_output_tokens for request in requests] == [each.num_output_tokens for each in load]
    counters = scheduler.counters
    return Round(
        seconds,
        processor_seconds,
        counters.num_preemptions - before["num_preemptions"],
        counters.recomputed_tokens - before["recomputed_tokens"],
        counters.generation_tokens - before["generation_tokens"],
        counters.steps - before["steps"],
        getattr(scheduler.admission, "seconds", 0.0) - spent,
    )


if __name__ == "__main__":
    main()
