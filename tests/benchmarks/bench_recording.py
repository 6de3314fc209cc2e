"""What recording costs: decode steps with all of it on against none, in turns, in one run.

``python -m tests.benchmarks.bench_recording MODEL [-tp 2] [--concurrency 1 32]``

One rank is measured in processor time, on one thread: all recording is work of this process, and other programs on the
machine disturb that least. Several ranks are measured by the wall clock.

On: one step in 17 measured on every rank (phases, collectives), what it measured recorded, the engine's state reported
ten times a second, and what an ingress records of every token. All of it in one process, though a service records the
tokens in another. Off: none of it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler_config import MEASURE_EVERY
from ridgewalk.engine.stats import EngineStats
from ridgewalk.engine.step import RankTimings
from ridgewalk.metrics.engine_metrics import EngineMetrics
from ridgewalk.metrics.exposition import merge
from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.metrics.snapshot import decode
from ridgewalk.model.phase_clock import PhaseClock
from ridgewalk.parallel.process_groups import make_process_groups
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.engine_loop import REPORT_EVERY_S
from ridgewalk.replica.offline import OfflineEngine
from tests.benchmarks.workload import prompts

BLOCK = MEASURE_EVERY
"""Steps of a turn: with recording on, exactly one of them is measured."""

NEVER = 10**9
NEW_TOKENS = 900


class Recorded:
    """An engine that decodes, with recorders that can be switched off and on between steps."""

    def __init__(self, engine: OfflineEngine, config: EngineConfig, spec: ModelSpec) -> None:
        self.engine = engine
        self.replica = EngineMetrics(config, "0", spec)
        self.ingress = IngressMetrics("0", [config.model_name])
        self._clock = time.process_time if config.world_size == 1 else time.perf_counter
        self.turns: dict[bool, list[float]] = {True: [], False: []}
        self.pairs: list[float] = []  # seconds that a turn with recording took longer than the one beside it
        self.measured: list[RankTimings] = []
        self.stats: EngineStats | None = None
        self._reported = 0.0
        self._model = config.model_name

    def run(self, concurrency: int, seed: int) -> None:
        """Decode ``concurrency`` sequences to their end, turns on and off in a random order within each pair."""
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
        for number, prompt in enumerate(prompts(concurrency, seed)):
            self.engine.core.add(str(number), 0, prompt, sampling)
        rng = random.Random(seed)
        scheduler = self.engine.core.scheduler
        while scheduler.num_waiting or scheduler.counters.steps % BLOCK != BLOCK // 2:
            self._step(False)  # prompts; then to half a turn before a measured step, steps in flight being few
        while self._tokens_left() > 2 * BLOCK + 4:
            first = rng.random() < 0.5
            seconds = {recording: self._turn(recording) for recording in (first, not first)}
            for recording, each in seconds.items():
                self.turns[recording].append(each)
            self.pairs.append(seconds[True] - seconds[False])
        while self.engine.core.has_work:
            self._step(False)
        self.engine.timings.clear()

    def _turn(self, recording: bool) -> float:
        counters = self.engine.core.scheduler.counters
        until = counters.steps - counters.steps % BLOCK + BLOCK + BLOCK // 2
        started = self._clock()
        while counters.steps < until:
            self._step(recording)
        return self._clock() - started

    def _step(self, recording: bool) -> None:
        core = self.engine.core
        core.measure_every = BLOCK if recording else NEVER
        while not (results := core.pump()):
            self.engine.executor.wait(1.0)
        for ranks in self.engine.executor.take_timings():
            self.measured = ranks
            if recording:
                self.replica.on_timings(ranks)
        if not recording:
            return
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY_S:
            self._reported = now
            self.stats = core.stats()
            self.replica.on_stats(self.stats)
        for result in results:
            for _ in result.new_tokens:
                self.ingress.on_tokens(self._model, 0.01, 1)

    def _tokens_left(self) -> int:
        running = self.engine.core.scheduler.groups[0].running
        return min((each.sampling.max_tokens - each.num_output_tokens for each in running), default=0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("-tp", type=int, default=1)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=60.0, help="to measure each concurrency for, at least")
    arguments = parser.parse_args()
    spec = ModelSpec.from_folder(arguments.model)
    config = EngineConfig(
        model_name=arguments.model.name, placement=f"TP{arguments.tp}", model_path=str(arguments.model),
        dtype=spec.dtype, tp=arguments.tp, max_model_len=1024, max_num_seqs=64, max_num_batched_tokens=4096,
        threads_per_rank=1, block_size=16, enable_prefix_caching=False, max_waiting=10_000, num_blocks=64 * 64,
    )  # fmt: skip
    print("| concurrency | step, off | step, on | recording costs | with 95 % within | pairs |\n" + 6 * "|---" + "|")
    with OfflineEngine(config) as engine:
        for concurrency in arguments.concurrency:
            recorded = Recorded(engine, config, spec)
            until = time.monotonic() + arguments.seconds
            for seed in itertools.count():
                recorded.run(concurrency, seed)
                if time.monotonic() > until:
                    break
            _report(concurrency, recorded)
        _report_calls(recorded, config)


def _report(concurrency: int, recorded: Recorded) -> None:
    off, on = (statistics.median(recorded.turns[recording]) for recording in (False, True))
    low, high = _interval(recorded.pairs)
    print(
        f"| {concurrency} | {off / BLOCK * 1e3:.3f} ms | {on / BLOCK * 1e3:.3f} ms | "
        f"{statistics.median(recorded.pairs) / off:+.2%} | {low / off:+.2%} to {high / off:+.2%} | "
        f"{len(recorded.pairs)} |"
    )


def _interval(values: list[float]) -> tuple[float, float]:
    """Of the median, by resampling."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[974]


def _report_calls(recorded: Recorded, config: EngineConfig) -> None:
    """Each call by itself, with what the last run measured."""
    replica, ingress = recorded.replica, recorded.ingress
    snapshots = replica.snapshot(), ingress.snapshot()
    answers = [decode(each) for each in snapshots]
    assert recorded.stats is not None
    calls: list[tuple[str, str, Callable[[], object]]] = [
        ("phases of a rank", "measured step, per phase and layer", _marks(config)),
        ("`on_timings`", "measured step", lambda: replica.on_timings(recorded.measured)),
        ("`stats`, `on_stats`", "0.1 s", lambda: replica.on_stats(recorded.engine.core.stats())),
        ("`on_tokens` of an ingress", "token", lambda: ingress.on_tokens(config.model_name, 0.01, 1)),
        (f"snapshot of a replica, {len(snapshots[0])} bytes", "scrape", replica.snapshot),
        (f"snapshot of an ingress, {len(snapshots[1])} bytes", "scrape", ingress.snapshot),
        (f"both merged to text, {len(merge(answers))} bytes", "scrape", lambda: merge(answers)),
    ]
    print("\n| call | once per | time |\n|---|---|---|")
    for name, once_per, call in calls:
        print(f"| {name} | {once_per} | {_median_seconds(call) * 1e6:.1f} us |")


def _marks(config: EngineConfig) -> Callable[[], object]:
    device = torch.device("cpu")
    clock = PhaseClock(make_process_groups(Mesh(), 0, "", device), device)
    clock.start()
    return lambda: clock.mark("mlp")


def _median_seconds(call: Callable[[], object], times: int = 1000) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
