"""One rank in the caller's own process: offline benchmarks, tests, machines without Ray. Imports torch."""

from __future__ import annotations

from collections import deque

from ridgewalk.engine.step import RankTimings, StepInput, StepOutput
from ridgewalk.model.runner import create_runner, device_memory, multiplies_fp8
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.host import memory_bytes
from ridgewalk.replica.sizing import check_host_memory, num_threads, size_cache


class InProcessExecutor:
    """Implements `engine.executor.Executor` for a mesh of one rank; a step runs when it is collected."""

    def __init__(self, config: EngineConfig, spec: ModelSpec) -> None:
        if config.world_size != 1:
            raise ValueError(f"the in-process executor runs one rank, not {config.world_size}; use spawned ranks")
        available = device_memory(config.device)[0] if config.device == "cuda" else memory_bytes()
        keeps_fp8 = multiplies_fp8(config.device, spec, config.dtype)
        self.memory_plan = size_cache(config, spec, available, keeps_fp8)
        check_host_memory(config, memory_bytes(), 1)
        threads = num_threads(config, 1)
        self._runner = create_runner(config.runner_config(rank=0, num_threads=threads, keeps_fp8=keeps_fp8))
        self._runner.load()
        self._runner.allocate(self.memory_plan.num_blocks, self.memory_plan.num_swap_blocks)
        self._runner.warm_up()
        self._submitted: deque[StepInput] = deque()
        self._measured: list[list[RankTimings]] = []

    def submit(self, step: StepInput) -> None:
        self._submitted.append(step)

    def wait(self, timeout_s: float) -> None:
        return

    def collect(self) -> list[StepOutput]:
        if not self._submitted:
            return []
        step = self._submitted.popleft()
        output = self._runner.execute(step)
        assert output is not None
        if (timings := self._runner.timings()) is not None:
            self._measured.append([timings])
        return [StepOutput(step.step_id, [output])]

    def take_timings(self) -> list[list[RankTimings]]:
        measured, self._measured = self._measured, []
        return measured

    def close(self) -> None:
        self._submitted.clear()
