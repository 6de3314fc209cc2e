"""Which tokens are computed in which step. Pure: no torch, no Ray, no clock of its own.

There is no prefill phase and no decode phase: every request has tokens, some of them computed, and each step lets
``num_computed_tokens`` chase ``num_tokens`` within one token budget. Running requests come first, then waiting ones,
and none of these in a step that had to preempt. With several steps in flight, and not scheduled ahead, steps are
micro-batches of a pipeline: see `micro_batches`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from ridgewalk.engine.admission import AdmissionPolicy
from ridgewalk.engine.advance import advance, rounds_until_event
from ridgewalk.engine.batch_builder import BatchBuilder
from ridgewalk.engine.block_counter import make_kv_cache
from ridgewalk.engine.kv_cache_manager import KVCacheManager, PrefixHit
from ridgewalk.engine.micro_batches import count_prefilling, row_limit
from ridgewalk.engine.predictive_admission import make_admission
from ridgewalk.engine.request import FinishReason, Request, RequestStatus, finish_reason
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.step import NO_TOKEN, GroupBatch, GroupOutput, StepInput, StepOutput
from ridgewalk.engine.step_result import NewToken, SchedulerCounters, StepResult


class RequestTooLargeError(ValueError):
    """The request could not be served even by an idle replica."""


@dataclass(eq=False)
class AttentionGroup:
    """Ranks that share one KV cache, and the requests whose KV is in it."""

    kv: KVCacheManager
    running: list[Request] = field(default_factory=list)  # in the order of admission
    throttled: bool = False  # in the last `Scheduler.schedule` work was left waiting for want of this KV alone
    num_throttled: int = 0  # such calls since the start, those that preempted included

    @property
    def num_blocks_attended(self) -> int:
        """KV blocks of the running requests, a shared one once for each: what their next tokens attend to."""
        return sum(len(request.block_ids) for request in self.running)


@dataclass(eq=False)
class _Plan:
    """One group's share of the step being scheduled."""

    group: AttentionGroup
    budget: int
    max_rows: int
    rows: list[tuple[Request, int]] = field(default_factory=list)  # request, tokens to compute

    def add(self, request: Request, num_tokens: int) -> None:
        self.rows.append((request, num_tokens))
        self.budget -= num_tokens

    @property
    def is_full(self) -> bool:
        """True when no further sequence may join the step."""
        return self.budget == 0 or len(self.rows) >= self.max_rows


@dataclass(eq=False)
class _OpenStep:
    """A step in flight; by group."""

    step_id: int
    rows: list[list[tuple[Request, bool]]]  # request, and whether the step samples for it
    sizes: list[int]  # sequences sampled for that have not ended


class Scheduler:
    """All queues and KV accounting of one replica.

    Every method is called from one thread. ``now`` is any monotonic time in seconds. ``admission`` is a policy instead
    of the one that ``config`` names.
    """

    def __init__(self, config: SchedulerConfig, admission: AdmissionPolicy | None = None) -> None:
        self.config = config
        self.admission = admission or make_admission(config)
        self.groups = [AttentionGroup(make_kv_cache(config)) for _ in range(config.num_groups)]
        self.waiting: deque[Request] = deque()
        self.counters = SchedulerCounters()
        self._requests: dict[int, Request] = {}  # by seq_id, until they end
        self._in_flight: deque[_OpenStep] = deque()
        self._builder = BatchBuilder(config.num_groups, config.counts_only)
        self._next_step_id = 0

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestTooLargeError: its prompt and ``max_tokens`` exceed the model length or the whole cache.
        """
        total = request.num_prompt_tokens + request.sampling.max_tokens
        if total > self.config.max_model_len:
            raise RequestTooLargeError(
                f"the prompt has {request.num_prompt_tokens} tokens and max_tokens is {request.sampling.max_tokens}: "
                f"together more than the model's context of {self.config.max_model_len} tokens"
            )
        if request.num_tokens < 1 or request.num_output_tokens >= request.sampling.max_tokens:
            raise ValueError("a request needs at least one token to compute and one to generate")
        self._requests[request.seq_id] = request
        self.waiting.append(request)

    def finish(self, seq_id: int, reason: FinishReason) -> Request | None:
        """End a request from outside (client gone, stop string). None when it has ended already.

        Its blocks are free at once, or when the steps in flight that refer to them have ended.
        """
        request = self._requests.get(seq_id)
        if request is not None:
            self._end(request, reason)
        return request

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks and have not ended."""
        return sum(len(group.running) for group in self.groups)

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet, preempted ones included."""
        return len(self.waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not yet updated."""
        return len(self._in_flight)

    @property
    def throttled(self) -> bool:
        """True when the last `schedule` left work waiting for want of KV alone, in any group."""
        return any(group.throttled for group in self.groups)

    def predicted_peaks(self) -> list[float | None]:
        """By group: the most KV blocks that what runs is predicted to use at one time. None: not predicted."""
        return self.admission.predicted_peaks(self.groups, self.counters.steps)

    # -- steps ------------------------------------------------------------------------------------------------------

    def schedule(self, now: float, measure: bool = False) -> StepInput | None:
        """The next step, or None when nothing can be computed now (idle, or all of it waits for steps in flight).

        Raises:
            RuntimeError: `max_steps_in_flight` steps are open already.
        """
        if len(self._in_flight) >= self.config.max_steps_in_flight:
            raise RuntimeError("schedule() called with max_steps_in_flight steps open")
        plans = [_Plan(group, self.config.max_num_batched_tokens, self._row_limit(group)) for group in self.groups]
        for group in self.groups:
            group.throttled = False
        preempted = [self._schedule_running(plan) for plan in plans]
        if self.waiting and not any(preempted):
            self.admission.prepare(self.groups, self.counters.steps)
            self._raise_row_limits(plans)
            self._schedule_waiting(plans, now)
        for group in self.groups:
            group.num_throttled += group.throttled
        if not any(plan.rows for plan in plans):
            return None
        batches = [self._commit(index, plan) for index, plan in enumerate(plans)]
        step = StepInput(self._next_step_id, batches, measure, others_in_flight=bool(self._in_flight))
        rows = [
            [(request, samples) for (request, _), samples in zip(plan.rows, batch.samples, strict=True)]
            for plan, batch in zip(plans, step.groups, strict=True)
        ]
        self._in_flight.append(_OpenStep(step.step_id, rows, [sum(batch.samples) for batch in step.groups]))
        self._next_step_id += 1
        self.counters.steps += 1
        return step

    def update(self, output: StepOutput) -> StepResult:
        """Take in the result of the oldest step in flight.

        Raises:
            RuntimeError: the output is of another step.
        """
        step = self._in_flight.popleft()
        if output.step_id != step.step_id:
            raise RuntimeError(f"output of step {output.step_id} came while step {step.step_id} was due")
        result = StepResult(step.step_id, [], [])
        for rows, group_output in zip(step.rows, output.groups, strict=True):
            self._update_group(rows, group_output, result)
        return result

    def rounds_until_event(self, at_most: int = 2**31) -> int:
        """Decode rounds ahead that are alike and may be applied at once: see `ridgewalk.engine.advance`."""
        return rounds_until_event(self, at_most)

    def advance(self, rounds: int, stopped: Collection[Request] = ()) -> list[Request]:
        """Apply decode rounds (with `counts_only`); returns who ends with the last, those of ``stopped`` among them."""
        return advance(self, rounds, stopped)

    def sizes_in_flight(self, index: int) -> list[int]:
        """Sequences of a group that each step in flight samples for, oldest first; those that have ended aside."""
        return [step.sizes[index] for step in self._in_flight]

    def renumber_in_flight(self, num_steps: int) -> None:
        """The steps in flight have gone round: they are ``num_steps`` later ones of the same sequences."""
        for index, group in enumerate(self.groups if self._in_flight else ()):
            position = {request.seq_id: at for at, request in enumerate(group.running)}
            for step in self._in_flight:
                step.rows[index].sort(key=lambda row: position[row[0].seq_id])
        for step in self._in_flight:
            step.step_id += num_steps
        self._next_step_id += num_steps
        self.counters.steps += num_steps

    # -- scheduling -------------------------------------------------------------------------------------------------

    def _schedule_running(self, plan: _Plan) -> bool:
        """Plan running requests, decodes before prefill chunks (a long prompt must not stop others' tokens).

        Returns True when a request was preempted to make room.
        """
        preempted = False
        # In flight, chunks of a prompt sample nothing: the next one needs no result of theirs.
        ahead, kv = self.config.schedule_ahead, plan.group.kv
        candidates = [
            (request, len(request.token_ids) + request.num_placeholders - request.num_computed_tokens)
            for request in plan.group.running
            if not request.num_in_flight or (request.may_sample_more if ahead else not request.num_placeholders)
        ]
        for request, left in [row for row in candidates if row[1] == 1] + [row for row in candidates if row[1] > 1]:
            if plan.is_full:
                break
            if request.status is not RequestStatus.RUNNING:
                continue
            num_tokens = left if left < plan.budget else plan.budget
            while not kv.grow(request, request.num_computed_tokens + num_tokens):
                plan.group.throttled = True
                victim = self.admission.victim(plan.group.running)
                if victim.num_in_flight:
                    break  # its blocks are not free at once: wait for the steps in flight instead
                preempted = True
                self._preempt(victim, plan)
                if victim is request:
                    break
            else:
                plan.add(request, num_tokens)
        return preempted

    def _preempt(self, victim: Request, plan: _Plan) -> None:
        """Take a request's blocks; it starts again from the front of the queue, with what is left of it."""
        plan.group.running.remove(victim)
        for row in [row for row in plan.rows if row[0] is victim]:
            plan.rows.remove(row)
            plan.budget += row[1]
        plan.group.kv.release(victim, awaited=True)
        victim.status = RequestStatus.WAITING
        victim.num_lost_tokens += victim.num_computed_tokens
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        self._builder.forget(victim)
        self.waiting.appendleft(victim)
        self.counters.num_preemptions += 1

    def _schedule_waiting(self, plans: list[_Plan], now: float) -> None:
        while self.waiting:
            request = self.waiting[0]
            open_plans = [
                plan for plan in plans if not plan.is_full and len(plan.group.running) < self.config.max_num_seqs
            ]
            choice = self._choose_group(request, open_plans)
            if choice is None:
                for plan in open_plans:
                    plan.group.throttled = True
                return
            plan, hit = choice
            self.waiting.popleft()
            self._admit(request, plan, hit, now)

    def _row_limit(self, group: AttentionGroup, num_admissible: int = 0) -> int:
        """Sequences of one group in the next step, with so many waiting ones that the group could admit.

        A prompt of several chunks may have one in every step, so it counts apart from those that sample.
        """
        if not self.config.micro_batches:
            return self.config.max_num_seqs
        index = self.groups.index(group)
        prefilling = count_prefilling(group.running)
        num_sequences = len(group.running) - prefilling + num_admissible
        return prefilling + row_limit(num_sequences, self.sizes_in_flight(index), self.config.max_steps_in_flight)

    def _raise_row_limits(self, plans: list[_Plan]) -> None:
        if self.config.micro_batches:
            for plan, num_admissible in zip(plans, self._count_admissible(plans), strict=True):
                if num_admissible:
                    plan.max_rows = self._row_limit(plan.group, num_admissible)

    def _count_admissible(self, plans: list[_Plan]) -> list[int]:
        """Waiting requests that each group could admit now: the first exactly, the others as if nothing was cached."""
        seats = [self.config.max_num_seqs - len(plan.group.running) for plan in plans]
        counts = [0] * len(plans)
        seated = [plan for plan, left in zip(plans, seats, strict=True) if left > 0]
        choice = self._choose_group(self.waiting[0], seated)
        if choice is None:
            for plan in seated:
                plan.group.throttled = True
            return counts
        available = [plan.group.kv.pool.num_available for plan in plans]
        index, num_hits = plans.index(choice[0]), choice[1].num_in_cache
        for request in self.waiting:
            needed = plans[index].group.kv.blocks_for(request.num_tokens) - num_hits
            if seats[index] == 0 or needed > available[index]:
                break
            counts[index] += 1
            seats[index] -= 1
            available[index] -= needed
            index, num_hits = max(range(len(plans)), key=lambda at: (seats[at] > 0, available[at])), 0
        return counts

    def _choose_group(self, request: Request, plans: list[_Plan]) -> tuple[_Plan, PrefixHit] | None:
        """Of the groups that can hold the request, the one where the least work is before it.

        Work is counted in KV blocks: those of its prompt that are not cached there, and those that the group's running
        sequences attend to at every step, a shared block once for each (as NVIDIA Dynamo's KV router weighs overlap
        against load). A prefix that everyone shares therefore does not draw everyone to one group.
        Among equals, the group with most room, and that would forget least.
        """
        hits = [(plan, plan.group.kv.find_prefix(request)) for plan in plans]
        fitting = [
            (plan, hit)
            for plan, hit in hits
            if plan.group.kv.can_admit(request, hit) and self.admission.admits(request, plan.group, hit)
        ]

        def cost(choice: tuple[_Plan, PrefixHit]) -> tuple[int, int, int]:
            group, hit = choice[0].group, choice[1]
            pool, missing = group.kv.pool, group.kv.blocks_for(request.num_tokens) - len(hit.blocks)
            return missing + group.num_blocks_attended, -pool.num_available, -pool.num_free

        return min(fitting, key=cost, default=None)

    def _admit(self, request: Request, plan: _Plan, hit: PrefixHit, now: float) -> None:
        plan.group.kv.admit(request, hit)
        request.status = RequestStatus.RUNNING
        self.groups[request.group].kv.await_no_more(request)  # if it was preempted there
        request.group = self.groups.index(plan.group)
        self.admission.on_admitted(request, plan.group)
        plan.group.running.append(request)
        if request.first_scheduled_time is None:
            request.first_scheduled_time = now
            request.num_cached_tokens = min(hit.num_tokens, request.num_prompt_tokens)
            self.counters.prompt_tokens += request.num_prompt_tokens
            self.counters.prefix_cache_queries += request.num_prompt_tokens
            self.counters.prefix_cache_hits += request.num_cached_tokens
        num_tokens = min(request.num_tokens_to_compute, plan.budget)
        plan.add(request, num_tokens)
        # Nothing preempts any more in this step: requests admitted next may share these blocks already.
        plan.group.kv.publish_computed(request, hit.num_tokens + num_tokens)

    def _commit(self, index: int, plan: _Plan) -> GroupBatch:
        """Advance the planned requests as if the step had run, and write it down for the ranks."""
        counters, kv = self.counters, plan.group.kv
        batch = self._builder.build(index, plan.rows, kv.swap.take_copies())
        publishes = not self.config.counts_only
        for (request, num_tokens), samples in zip(plan.rows, batch.samples, strict=True):
            before = request.num_computed_tokens
            request.num_computed_tokens = after = before + num_tokens
            request.num_in_flight += 1
            if request.max_computed_tokens > before:
                counters.recomputed_tokens += min(request.max_computed_tokens, after) - before
            if request.max_computed_tokens < after:
                request.max_computed_tokens = after
            request.num_placeholders += samples
            if publishes:
                kv.publish_computed(request, after)
        counters.computed_tokens += batch.num_tokens
        return batch

    # -- results ----------------------------------------------------------------------------------------------------

    def _update_group(self, rows: list[tuple[Request, bool]], output: GroupOutput, result: StepResult) -> None:
        logprobs = output.logprobs or [None] * len(rows)
        for (request, samples), token_id, chances in zip(rows, output.token_ids, logprobs, strict=True):
            request.num_in_flight -= 1
            request.num_placeholders -= samples
            if request.status is RequestStatus.ENDED:
                self._release_if_idle(request)
                continue
            if not samples:
                continue
            if token_id == NO_TOKEN:
                raise RuntimeError(f"step {result.step_id} brought no token for sequence {request.seq_id}")
            offset = len(request.token_ids) - request.num_prompt_tokens
            request.token_ids.append(token_id)
            self.counters.generation_tokens += 1
            result.new_tokens.append(NewToken(request, offset, token_id, chances))
            reason = finish_reason(request, token_id)
            if reason is not None:
                self._end(request, reason)
                result.ended.append(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        del self._requests[request.seq_id]
        if request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
            self.groups[request.group].kv.await_no_more(request)
        else:
            self.groups[request.group].running.remove(request)
            self._builder.forget(request)
            for step in self._in_flight if request.num_placeholders else ():  # it is ended from outside
                rows = step.rows[request.group]
                step.sizes[request.group] -= len([row for row in rows if row[0] is request and row[1]])
        request.status = RequestStatus.ENDED
        request.finish_reason = reason
        self.admission.on_ended(request)
        self._release_if_idle(request)

    def _release_if_idle(self, request: Request) -> None:
        if request.num_in_flight == 0 and request.block_ids:
            self.groups[request.group].kv.release(request)
