"""One replica in virtual time: the real `Scheduler`, ranks that only take time, and a log of what requests saw."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from ridgewalk.engine.request import Request, RequestStatus
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler import Scheduler
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.step import NO_TOKEN, GroupBatch, GroupOutput, StepInput, StepOutput
from ridgewalk.engine.step_meter import StepMeans, StepMeter
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
        self.meter: StepMeter | None = None  # of steps, for who learns from them
        self._ended: list[Request] = []  # while metered
        self._running: dict[int, Request] = {}
        self._totals: dict[int, int] = {}  # tokens of prompt and output, by seq_id
        # In a pipeline: until this request has so many tokens, something happens to it within the round that goes on.
        self._watched: tuple[Request, int] | None = None
        self._open: deque[tuple[StepInput, float]] = deque()  # steps in flight, and when they end
        self._stage_free_s = [0.0] * self.cost.num_stages
        self._host_free_s = 0.0

    @property
    def has_work(self) -> bool:
        """True until every request has ended."""
        return bool(self._running)

    @property
    def requests(self) -> Collection[Request]:
        """Those that have not ended."""
        return self._running.values()

    def take_ended(self) -> list[Request]:
        """Those that ended since the last call; kept only while steps are metered."""
        ended, self._ended = self._ended, []
        return ended

    def sampling(self, effort: str) -> SamplingParams:
        """What a request asks for."""
        return SamplingParams(max_tokens=self.max_output_length, stop_token_ids=(STOP_TOKEN,), reasoning_effort=effort)

    def arrive(self, now_s: float, seq_id: int, prompt_length: int, output_length: int, effort: str = "") -> None:
        """Queue a request, at a time that `run_until` has reached."""
        if not self.has_work:
            self.clock_s = max(self.clock_s, now_s)
        request = Request(seq_id, "", 0, [OTHER_TOKEN] * prompt_length, prompt_length, self.sampling(effort), now_s)
        self.scheduler.add(request)
        self._running[seq_id] = request
        self._totals[seq_id] = prompt_length + output_length
        self.logs[seq_id] = RequestLog(now_s, output_length)

    def run_until(self, limit_s: float = math.inf) -> None:
        """Run the steps that begin before ``limit_s``."""
        while self.has_work and self.clock_s < limit_s:
            if not self._advance(limit_s):
                self._step()

    # -- many steps ---------------------------------------------------------------------------------------------------

    def _advance(self, limit_s: float) -> bool:
        """Take all the steps until something happens at once. False: the next step is unlike the one after it."""
        if self._watched is not None:
            request, num_tokens = self._watched
            if request.status is RequestStatus.RUNNING and len(request.token_ids) < num_tokens:
                return False
            self._watched = None
        running = [request for group in self.scheduler.groups for request in group.running]
        if not running:
            return False
        totals, micro_batches = self._totals, 1 + len(self._open)
        left = [totals[request.seq_id] - len(request.token_ids) for request in running]
        fewest = min(left)
        if micro_batches > 1:
            self._watched = self._next_event(running, left)
            if self._watched is not None:
                return False
        rounds = self.scheduler.rounds_until_event(fewest - (micro_batches > 1))
        if rounds < 1:
            return False
        loads = self._decode_loads(micro_batches)
        if limit_s < math.inf:
            rounds = self._rounds_before(limit_s, rounds, micro_batches, loads)
        # Each round takes as long as the one before and a constant more: all of them, so many times the middle one.
        stages, host_s, seconds = self._round(loads, micro_batches, (rounds - 1) / 2)
        self._account(stages, host_s, rounds * micro_batches)
        if self.meter is not None:
            self._meter_rounds(self.meter, rounds, seconds)
        stopped = {request for request, count in zip(running, left, strict=True) if count == rounds == fewest}
        ended = self.scheduler.advance(rounds, stopped)
        self._pass(rounds * seconds, rounds * micro_batches)
        self._end(ended)
        return True

    def _meter_rounds(self, meter: StepMeter, rounds: int, seconds: float) -> None:
        groups = self.scheduler.groups
        number, blocks = sum(len(group.running) for group in groups), sum(group.num_blocks_attended for group in groups)
        grown = number * rounds / 2 / self.config.block_size
        meter.add(StepMeans(rounds, seconds, number, blocks + grown, 0))

    def _next_event(self, running: list[Request], left: list[int]) -> tuple[Request, int] | None:
        """A request that ends within this round, or whose prompt does: its first token comes in that very step."""
        for request, count in zip(running, left, strict=True):
            if count == 1 or len(request.token_ids) == request.num_prompt_tokens:
                return request, len(request.token_ids) + 1
        return None

    def _pass(self, seconds: float, num_steps: int) -> None:
        """So much time has passed and everything in flight is again as it was, so many steps later."""
        self.clock_s += seconds
        self._host_free_s += seconds
        self._stage_free_s = [free + seconds for free in self._stage_free_s]
        self._open = deque(
            (StepInput(step.step_id + num_steps, step.groups), end + seconds) for step, end in self._open
        )

    def _rounds_before(self, limit_s: float, rounds: int, micro_batches: int, loads: list[GroupLoad]) -> int:
        """Rounds that begin before ``limit_s``."""
        gap, first = limit_s - self.clock_s, self._round(loads, micro_batches, 0)[2]
        last = self._round(loads, micro_batches, rounds - 1)[2]
        if gap >= rounds * (first + last) / 2:
            return rounds
        more = (last - first) / max(1, rounds - 1)
        half = first - more / 2  # of: more / 2 * n^2 + half * n = gap
        count = gap / half if more <= 0 else (math.sqrt(half * half + 2 * more * gap) - half) / more
        return max(1, min(rounds, math.ceil(count)))

    def _decode_loads(self, micro_batches: int) -> list[GroupLoad]:
        """Of each attention group's mean micro-batch in the next round."""
        loads = []
        for group in self.scheduler.groups:
            number = len(group.running)
            contexts = sum([request.num_computed_tokens for request in group.running]) + number
            share = number / micro_batches
            loads.append(GroupLoad(share, share, contexts / micro_batches, contexts / micro_batches))
        return loads

    def _round(
        self, loads: list[GroupLoad], micro_batches: int, rounds_ahead: float
    ) -> tuple[list[StepTime], float, float]:
        """One micro-batch's time on each stage and on the host, and the seconds of the round after so many others."""
        grown = [
            GroupLoad(load.num_tokens, load.num_sequences, contexts, contexts)
            for load in loads
            for contexts in (load.kv_tokens + load.num_sequences * rounds_ahead,)
        ]
        stages = self.cost.stage_times(grown)
        host_s = self.cost.host_s(sum(load.num_sequences for load in loads))
        times = [stage.total for stage in stages]
        if self.cost.num_stages > 1:
            return stages, host_s, max(host_s + sum(times), micro_batches * max(host_s, *times))
        return stages, host_s, max(host_s, times[0]) if self.host_overlaps else host_s + times[0]

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
        for request in [token.request for token in result.new_tokens if token.offset == 0]:
            self.logs[request.seq_id].first_token_s = self.clock_s
        self._end(result.ended)

    def _submit(self, step: StepInput) -> float:
        """When a step that is scheduled now will have ended."""
        loads = [_load(batch) for batch in step.groups]
        stages = self.cost.stage_times(loads)
        host_s = self.cost.host_s(sum(load.num_sequences for load in loads))
        self._account(stages, host_s, 1)
        if self.cost.num_stages == 1:
            total = stages[0].total
            seconds = max(host_s, total) if self.host_overlaps else host_s + total
            if self.meter is not None:
                self.meter.observe(step, seconds)
            return self.clock_s + seconds
        if self.meter is not None:
            seconds = max(host_s, *(stage.total for stage in stages))
            self.meter.observe(step, seconds, self.cost.num_stages)
        ready = self._host_free_s = max(self._host_free_s, self.clock_s) + host_s
        for index, stage in enumerate(stages):
            ready = self._stage_free_s[index] = max(self._stage_free_s[index], ready) + stage.total
        return ready

    def _sample(self, batch: GroupBatch) -> GroupOutput:
        running, totals = self._running, self._totals
        return GroupOutput(
            [
                (STOP_TOKEN if len(running[seq_id].token_ids) + 1 >= totals[seq_id] else OTHER_TOKEN)
                if samples
                else NO_TOKEN
                for seq_id, samples in zip(batch.seq_ids, batch.samples, strict=True)
            ]
        )

    # -- accounts -----------------------------------------------------------------------------------------------------

    def _end(self, ended: list[Request]) -> None:
        for request in ended:
            self.logs[request.seq_id].end_s = self.clock_s
            del self._running[request.seq_id]
        if self.meter is not None:
            self._ended += ended

    def _account(self, stages: list[StepTime], host_s: float, steps: float) -> None:
        for term, seconds in zip(StepTime._fields, zip(*stages, strict=True), strict=True):
            self._add(term, sum(seconds) / len(stages) * steps)
        if len(stages) == 1 and not self.host_overlaps:
            self._add(HOST, host_s * steps)

    def _add(self, term: str, seconds: float) -> None:
        self.spent_s[term] = self.spent_s.get(term, 0.0) + seconds


def _load(batch: GroupBatch) -> GroupLoad:
    num_tokens, num_sequences = batch.num_tokens, len(batch.seq_ids)
    if num_tokens == num_sequences:  # all of them decode
        contexts = sum(batch.num_computed_tokens) + num_tokens
        return GroupLoad(num_tokens, num_sequences, contexts, contexts)
    kv_tokens, pairs = 0, 0.0
    for computed, scheduled in zip(batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True):
        kv_tokens += computed + scheduled
        pairs += scheduled * (computed + (scheduled + 1) / 2)
    return GroupLoad(num_tokens, num_sequences, kv_tokens, pairs)
