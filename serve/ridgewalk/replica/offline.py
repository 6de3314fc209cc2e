"""The engine without Ray and without HTTP: benchmarks, tests, machines that only compute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.executor import Executor
from ridgewalk.engine.request import Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import RankTimings
from ridgewalk.placement.memory import MemoryPlan
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.expert_load_recorder import make_expert_load_recorder
from ridgewalk.replica.spawned_ranks import SpawnedRanks
from ridgewalk.replica.zmq_executor import ZmqExecutor


class OfflineEngine:
    """One replica in this process: its only rank too (world size 1, torch is imported), else ranks as children.

    Raises:
        MemoryPlanError, UnsupportedModelError, CheckpointError, ExecutorError: as the replica would.
    """

    def __init__(self, config: EngineConfig, spawn: bool = False) -> None:
        spec = ModelSpec.from_folder(config.model_path)
        self._vocab_size = spec.vocab_size
        self.executor, self.memory_plan = _make_executor(config, spec, spawn)
        self._expert_loads = make_expert_load_recorder(config, spec)
        self.core = EngineCore(config.scheduler_config(self.memory_plan), self.executor, time.monotonic)
        self.timings: list[list[RankTimings]] = []

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self, prompts: Sequence[list[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Request]:
        """Run all prompts to their end, batched as the scheduler sees fit; the finished requests, in order.

        Raises:
            ValueError: a token id is not in the vocabulary.
        """
        for number, prompt in enumerate(prompts):
            if not all(0 <= token < self._vocab_size for token in prompt):
                raise ValueError(
                    f"prompt {number} has token ids outside of the vocabulary of {self._vocab_size} tokens"
                )
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        requests = [
            self.core.add(str(number), 0, prompt, params)
            for number, (prompt, params) in enumerate(zip(prompts, each, strict=True))
        ]
        self.run()
        return requests

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.core.has_work:
            self.core.pump()
            self._take_timings()
            if self.core.has_work:
                self.executor.wait(1.0)

    def close(self) -> None:
        """End the ranks."""
        self.executor.close()
        if self._expert_loads is not None:
            self._expert_loads.close()

    def _take_timings(self) -> None:
        for ranks in self.executor.take_timings():
            self.timings.append(ranks)
            if self._expert_loads is not None:
                self._expert_loads.on_timings(ranks)


def _make_executor(config: EngineConfig, spec: ModelSpec, spawn: bool) -> tuple[Executor, MemoryPlan]:
    if config.world_size == 1 and not spawn:
        from ridgewalk.replica.in_process_executor import InProcessExecutor  # imports torch

        local = InProcessExecutor(config, spec)
        return local, local.memory_plan
    remote = ZmqExecutor(config, spec, SpawnedRanks())
    return remote, remote.memory_plan
