"""The engine: a scheduler, an executor, and the loop body that keeps the one feeding the other."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from ridgewalk.engine.executor import Executor
from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler import Scheduler
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.stats import EngineStats, snapshot
from ridgewalk.engine.step import StepInput
from ridgewalk.engine.step_meter import StepMeter
from ridgewalk.engine.step_result import StepResult


class EngineCore:
    """One replica's engine. All methods are called from one thread; ``clock`` is any monotonic seconds."""

    def __init__(self, config: SchedulerConfig, executor: Executor, clock: Callable[[], float]) -> None:
        self.scheduler = Scheduler(config)
        self.executor = executor
        self.throttled_seconds = 0.0  # time during which work waited for KV blocks alone
        self.last_progress = clock()  # when a step last ended, or work last arrived at an idle engine
        self.measure_every = config.measure_every
        self._clock = clock
        self.meter = StepMeter(config.block_size)
        self._seq_ids = itertools.count()
        self._submitted: deque[tuple[StepInput, float]] = deque()  # steps in flight, and when they were given
        self._throttled_since: float | None = None

    def add(
        self,
        request_id: str,
        index: int,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        output_token_ids: list[int] | None = None,
    ) -> Request:
        """Queue one sequence; ``output_token_ids`` were generated before, elsewhere, and are continued.

        Raises:
            RequestTooLargeError: it could never be served.
            ValueError: nothing to compute or to generate.
        """
        now = self._clock()
        request = Request(
            seq_id=next(self._seq_ids),
            request_id=request_id,
            index=index,
            token_ids=prompt_token_ids + (output_token_ids or []),
            num_prompt_tokens=len(prompt_token_ids),
            sampling=sampling,
            arrival_time=now,
        )
        if not self.has_work:
            self.last_progress = now
        self.scheduler.add(request)
        return request

    def finish(self, request: Request, reason: FinishReason) -> bool:
        """End a request from outside. False when it had ended already."""
        return self.scheduler.finish(request.seq_id, reason) is not None

    @property
    def has_work(self) -> bool:
        """True while a request has not ended or a step is in flight."""
        return bool(self.scheduler.num_running or self.scheduler.num_waiting or self.scheduler.num_in_flight)

    def pump(self) -> list[StepResult]:
        """Take in what the ranks have finished and give them all the steps they may have. Never waits.

        Raises:
            ExecutorError: a rank died or failed.
        """
        results = [self.scheduler.update(output) for output in self.executor.collect()]
        now = self._clock()
        if results:
            self._meter_steps(len(results), now)
            self.last_progress = now
        while self.scheduler.num_in_flight < self.scheduler.config.max_steps_in_flight:
            measure = self.scheduler.counters.steps % self.measure_every == self.measure_every - 1
            step = self.scheduler.schedule(now, measure)
            if step is None:
                break
            self._submitted.append((step, now))
            self.executor.submit(step)
        self._account_throttling(now)
        return results

    def stats(self) -> EngineStats:
        """What the metrics and the router know of this engine."""
        return snapshot(self.scheduler, self.throttled_seconds)

    def _meter_steps(self, num_steps: int, now: float) -> None:
        """The oldest steps have ended. One that was given ahead began when the one before it ended."""
        config = self.scheduler.config
        rounds = config.max_steps_in_flight if config.micro_batches else 1
        seconds = (now - max(self.last_progress, self._submitted[0][1])) / num_steps
        for _ in range(num_steps):
            self.meter.observe(self._submitted.popleft()[0], seconds, rounds)

    def _account_throttling(self, now: float) -> None:
        if self._throttled_since is not None:
            self.throttled_seconds += now - self._throttled_since
        self._throttled_since = now if self.scheduler.throttled and self.has_work else None
