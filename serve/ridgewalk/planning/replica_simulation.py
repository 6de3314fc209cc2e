"""One replica in virtual time: the real `Scheduler`, ranks that only take time, and a log of what requests saw."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, fields

from ridgewalk.engine.request import Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler import Scheduler
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.step import NO_TOKEN, GroupBatch, GroupOutput, StepInput, StepOutput
from ridgewalk.placement.cost_model import CostModel, GroupLoad, StepTime

STOP_TOKEN, OTHER_TOKEN = 1, 0
HOST = "host"


@dataclass
class RequestLog:
    """What one request saw; seconds of virtual time."""

    arrival_s: float
    output_length: int
    first_token_s: float = math.nan
    end_s: float = math.nan

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds from one token to the next; None with a single token."""
        if self.output_length < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.output_length - 1)


@dataclass
class ReplicaSimulation:
    """A replica that serves requests whose lengths only its ranks know.

    Without pipeline stages a step takes the host's and the ranks' time, one after the other, or with ``host_overlaps``
    the longer of the two. With stages the host and each stage serve one step at a time, steps follow one another.
    """

    config: SchedulerConfig
    cost: CostModel
    max_output_length: int
    host_overlaps: bool = False
    clock_s: float = 0.0
    logs: dict[int, RequestLog] = field(default_factory=dict)  # by seq_id
    spent_s: dict[str, float] = field(default_factory=dict)  # by term; the host's where it is alone

    def __post_init__(self) -> None:
        """Start idle."""
        self.scheduler = Scheduler(self.config)
        self._sampling = SamplingParams(max_tokens=self.max_output_length, stop_token_ids=(STOP_TOKEN,))
        self._running: dict[int, Request] = {}
        self._open: deque[tuple[StepInput, float]] = deque()  # steps in flight, and when they end
        self._stage_free_s = [0.0] * self.cost.num_stages
        self._host_free_s = 0.0

    @property
    def has_work(self) -> bool:
        """True until every request has ended."""
        return bool(self._running)

    def arrive(self, now_s: float, seq_id: int, prompt_length: int, output_length: int) -> None:
        """Queue a request, at a time that `run_until` has reached."""
        if not self.has_work:
            self.clock_s = max(self.clock_s, now_s)
        request = Request(seq_id, "", 0, [OTHER_TOKEN] * prompt_length, prompt_length, self._sampling, now_s)
        self.scheduler.add(request)
        self._running[seq_id] = request
        self.logs[seq_id] = RequestLog(now_s, output_length)

    def run_until(self, limit_s: float = math.inf) -> None:
        """Run the steps that begin before ``limit_s``."""
        while self.has_work and self.clock_s < limit_s:
            if not self._advance(limit_s):
                self._step()

    # -- many steps ---------------------------------------------------------------------------------------------------

    def _advance(self, limit_s: float) -> bool:
        """Take all the steps until something happens at once. False: the next step is unlike the one after it."""
        rounds = self.scheduler.rounds_until_event()
        if rounds < 1:
            return False
        running = [request for group in self.scheduler.groups for request in group.running]
        left = [self.logs[request.seq_id].output_length - request.num_output_tokens for request in running]
        micro_batches = 1 + len(self._open)
        rounds = min(rounds, min(left) - (micro_batches > 1))  # in a pipeline a sequence ends within a round
        if rounds < 1 or any(request.num_output_tokens == 0 for request in running):
            return False  # the first token of a prompt in flight comes in its own step
        rounds = self._rounds_before(limit_s, rounds, micro_batches)
        seconds = rounds * self._round_s((rounds - 1) / 2, micro_batches, rounds)
        stopped = {request for request, count in zip(running, left, strict=True) if count == rounds}
        ended = self.scheduler.advance(rounds, stopped)
        self.clock_s += seconds
        self._host_free_s += seconds
        self._stage_free_s = [free + seconds for free in self._stage_free_s]
        later = rounds * micro_batches
        self._open = deque((StepInput(step.step_id + later, step.groups), end + seconds) for step, end in self._open)
        self._end(ended)
        return True

    def _rounds_before(self, limit_s: float, rounds: int, micro_batches: int) -> int:
        """Rounds that begin before ``limit_s``: each takes as long as the one before and a constant more."""
        gap, first = limit_s - self.clock_s, self._round_s(0, micro_batches)
        if gap >= rounds * self._round_s((rounds - 1) / 2, micro_batches):
            return rounds
        more = (self._round_s(rounds - 1, micro_batches) - first) / max(1, rounds - 1)
        half = first - more / 2  # of: more / 2 * n^2 + half * n = gap
        count = gap / half if more <= 0 else (math.sqrt(half * half + 2 * more * gap) - half) / more
        return max(1, min(rounds, math.ceil(count)))

    def _round_s(self, rounds_ahead: float, micro_batches: int, rounds: int = 0) -> float:
        """Seconds of the round after so many others. ``rounds``: so many like it are on the account of `spent_s`."""
        loads = []
        for group in self.scheduler.groups:
            number = len(group.running)
            contexts = sum([request.num_computed_tokens for request in group.running]) + number * (1 + rounds_ahead)
            share = number / micro_batches
            loads.append(GroupLoad(share, share, contexts / micro_batches, contexts / micro_batches))
        stages = self.cost.stage_times(loads)
        host_s = self.cost.host_s(sum(load.num_sequences for load in loads))
        times = [stage.total for stage in stages]
        if self.cost.num_stages == 1:
            seconds = max(host_s, times[0]) if self.host_overlaps else host_s + times[0]
        else:
            seconds = max(host_s + sum(times), micro_batches * max(host_s, *times))
        if rounds:
            self._account(stages, host_s, rounds * micro_batches)
        return seconds

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        while self.scheduler.num_in_flight < self.config.max_steps_in_flight:
            step = self.scheduler.schedule(self.clock_s)
            if step is None:
                break
            self._open.append((step, self._submit(step)))
        step, end_s = self._open.popleft()
        self.clock_s = max(self.clock_s, end_s)
        result = self.scheduler.update(StepOutput(step.step_id, [self._sample(batch) for batch in step.groups]))
        for token in result.new_tokens:
            if token.offset == 0:
                self.logs[token.request.seq_id].first_token_s = self.clock_s
        self._end(result.ended)

    def _submit(self, step: StepInput) -> float:
        """When a step that is scheduled now will have ended."""
        loads = [_load(batch) for batch in step.groups]
        stages = self.cost.stage_times(loads)
        host_s = self.cost.host_s(sum(load.num_sequences for load in loads))
        self._account(stages, host_s, 1)
        if self.cost.num_stages == 1:
            total = stages[0].total
            return self.clock_s + (max(host_s, total) if self.host_overlaps else host_s + total)
        ready = self._host_free_s = max(self._host_free_s, self.clock_s) + host_s
        for index, stage in enumerate(stages):
            ready = self._stage_free_s[index] = max(self._stage_free_s[index], ready) + stage.total
        return ready

    def _sample(self, batch: GroupBatch) -> GroupOutput:
        return GroupOutput(
            [
                (STOP_TOKEN if self._is_last(seq_id) else OTHER_TOKEN) if samples else NO_TOKEN
                for seq_id, samples in zip(batch.seq_ids, batch.samples, strict=True)
            ]
        )

    def _is_last(self, seq_id: int) -> bool:
        return self._running[seq_id].num_output_tokens + 1 >= self.logs[seq_id].output_length

    # -- accounts -----------------------------------------------------------------------------------------------------

    def _end(self, ended: list[Request]) -> None:
        for request in ended:
            self.logs[request.seq_id].end_s = self.clock_s
            del self._running[request.seq_id]

    def _account(self, stages: list[StepTime], host_s: float, steps: float) -> None:
        for term in fields(StepTime):
            mean = sum(getattr(stage, term.name) for stage in stages) / len(stages)
            self._add(term.name, mean * steps)
        if len(stages) == 1 and not self.host_overlaps:
            self._add(HOST, host_s * steps)

    def _add(self, term: str, seconds: float) -> None:
        self.spent_s[term] = self.spent_s.get(term, 0.0) + seconds


def _load(batch: GroupBatch) -> GroupLoad:
    kv_tokens, pairs = 0, 0.0
    for computed, scheduled in zip(batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True):
        kv_tokens += computed + scheduled
        pairs += scheduled * (computed + (scheduled + 1) / 2)
    return GroupLoad(batch.num_tokens, len(batch.seq_ids), kv_tokens, pairs)
