"""`Scheduler.advance` equals as many single steps, in everything that can be seen of a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler import Scheduler
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.step import NO_TOKEN, GroupBatch, GroupOutput, StepInput, StepOutput

STOP, OTHER = 1, 0

Arrival = tuple[int, int, int, int]  # after so many steps; prompt, output and limit in tokens


class Simulation:
    """A scheduler, and ranks that know when each sequence stops; the scheduler only learns it as they sample."""

    def __init__(self, config: SchedulerConfig, arrivals: list[Arrival], in_bulk: bool) -> None:
        self.scheduler = Scheduler(config)
        self.in_bulk = in_bulk
        self.arrivals = sorted(arrivals, key=lambda arrival: arrival[0])
        self.requests: dict[int, Request] = {}
        self.lengths: dict[int, int] = {}
        self.open: list[StepInput] = []
        self.ends: list[tuple[int, int, FinishReason | None]] = []  # steps before, sequence, why
        self.bulk_steps = 0

    @property
    def num_updates(self) -> int:
        return self.scheduler.counters.steps - self.scheduler.num_in_flight

    def run(self, observe: Callable[[Simulation], None]) -> None:
        while self.arrivals or self.scheduler.num_running or self.scheduler.num_waiting:
            idle = not (self.scheduler.num_running or self.scheduler.num_waiting)
            while self.arrivals and (idle or self.arrivals[0][0] <= self.num_updates):
                self.arrive(*self.arrivals.pop(0)[1:])
                idle = False
            observe(self)
            if not (self.in_bulk and self.advance()):
                self.step()

    def arrive(self, prompt: int, output: int, limit: int) -> None:
        sampling = SamplingParams(max_tokens=limit, stop_token_ids=(STOP,))
        first = 100 * len(self.requests)  # prompts have nothing in common
        request = Request(len(self.requests), "r", 0, list(range(first, first + prompt)), prompt, sampling)
        self.requests[request.seq_id], self.lengths[request.seq_id] = request, output
        self.scheduler.add(request)

    def advance(self) -> bool:
        rounds = self.scheduler.rounds_until_event()
        steps_a_round = 1 + self.scheduler.num_in_flight
        if self.arrivals:
            rounds = min(rounds, (self.arrivals[0][0] - self.num_updates) // steps_a_round)
        running = [request for group in self.scheduler.groups for request in group.running]
        left = {request: self.lengths[request.seq_id] - request.num_output_tokens for request in running}
        rounds = min([rounds, *(count - (steps_a_round > 1) for count in left.values())])
        if rounds < 1:
            return False
        stopped = {request for request, count in left.items() if count == rounds}
        ended = self.scheduler.advance(rounds, stopped)
        self.bulk_steps += rounds * steps_a_round
        self.open = [replace_id(step, rounds * steps_a_round) for step in self.open]
        self.ends += [(self.num_updates, request.seq_id, request.finish_reason) for request in ended]
        return True

    def step(self) -> None:
        while self.scheduler.num_in_flight < self.scheduler.config.max_steps_in_flight:
            step = self.scheduler.schedule(0.0)
            if step is None:
                break
            self.open.append(step)
        step = self.open.pop(0)
        result = self.scheduler.update(StepOutput(step.step_id, [self.sample(batch) for batch in step.groups]))
        self.ends += [(self.num_updates, request.seq_id, request.finish_reason) for request in result.ended]

    def sample(self, batch: GroupBatch) -> GroupOutput:
        return GroupOutput(
            [
                NO_TOKEN if not samples else STOP if self.is_last(seq_id) else OTHER
                for seq_id, samples in zip(batch.seq_ids, batch.samples, strict=True)
            ]
        )

    def is_last(self, seq_id: int) -> bool:
        return self.requests[seq_id].num_output_tokens + 1 == self.lengths[seq_id]


def replace_id(step: StepInput, later: int) -> StepInput:
    return StepInput(step.step_id + later, step.groups)


def state(simulation: Simulation) -> object:
    """Everything but the ids of tokens and blocks."""
    scheduler = simulation.scheduler
    return (
        [request.seq_id for request in scheduler.waiting],
        [
            (
                [request.seq_id for request in group.running],
                group.kv.pool.num_free,
                group.kv.pool.num_cached,
                group.kv.pool.num_used,
                group.throttled,
                group.num_throttled,
            )
            for group in scheduler.groups
        ],
        asdict(scheduler.counters),
        scheduler.num_in_flight,
        [
            (
                request.status,
                request.num_tokens,
                request.num_computed_tokens,
                request.max_computed_tokens,
                request.num_placeholders,
                request.num_in_flight,
                request.num_preemptions,
                len(request.block_ids),
            )
            for request in simulation.requests.values()
        ],
    )


@st.composite
def lives(draw: st.DrawFn) -> tuple[SchedulerConfig, list[Arrival]]:
    block_size, num_blocks = draw(st.integers(1, 4)), draw(st.integers(8, 40))
    length = num_blocks * block_size
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=length,
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.integers(1, 16)),
        max_steps_in_flight=draw(st.integers(1, 4)),
        num_groups=draw(st.integers(1, 3)),
        enable_prefix_caching=False,
        admission=draw(st.sampled_from(("prompt_only", "predictive"))),
    )
    arrivals = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.integers(1, min(12, length - 1)))
        limit = draw(st.integers(1, length - prompt))
        arrivals.append((draw(st.sampled_from((0, 0, 0, 5, 30))), prompt, draw(st.integers(1, limit + 2)), limit))
    return config, arrivals


TWO_GROUPS = SchedulerConfig(
    num_blocks=38, block_size=4, max_model_len=152, max_num_seqs=2, max_num_batched_tokens=2, num_groups=2,
    enable_prefix_caching=False, admission="predictive",
)  # fmt: skip
ASKED_AFTER_A_PREEMPTION = [
    (0, 4, 73, 78), (0, 4, 75, 82), (0, 1, 1, 1), (0, 1, 73, 73), (0, 1, 64, 64), (0, 1, 1, 1), (0, 9, 1, 13),
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@example((TWO_GROUPS, ASKED_AFTER_A_PREEMPTION))
@given(lives())
def test_advancing_equals_single_steps_in_every_observable(life: tuple[SchedulerConfig, list[Arrival]]) -> None:
    config, arrivals = life
    seen: dict[int, object] = {}
    singly = Simulation(config, list(arrivals), in_bulk=False)
    singly.run(lambda simulation: seen.__setitem__(simulation.num_updates, state(simulation)))
    bulk = Simulation(replace(config, counts_only=True), list(arrivals), in_bulk=True)

    def compare(simulation: Simulation) -> None:
        assert state(simulation) == seen[simulation.num_updates]
        for group in simulation.scheduler.groups:
            group.kv.pool.check_integrity()

    bulk.run(compare)
    assert bulk.ends == singly.ends
    assert state(bulk) == state(singly)


@pytest.mark.parametrize(("stages", "groups"), [(1, 1), (1, 2), (4, 1), (2, 2)])
def test_nearly_all_steps_of_long_answers_are_taken_in_bulk(stages: int, groups: int) -> None:
    config = SchedulerConfig(
        num_blocks=2000, max_model_len=4000, max_num_seqs=8, max_steps_in_flight=stages, num_groups=groups,
        enable_prefix_caching=False, counts_only=True,
    )  # fmt: skip
    simulation = Simulation(config, [(0, 40, 300 + 137 * index, 3000) for index in range(16)], in_bulk=True)
    simulation.run(lambda _: None)
    assert len(simulation.ends) == 16
    assert simulation.bulk_steps > 0.9 * simulation.scheduler.counters.steps


def test_what_cannot_be_advanced_is_refused() -> None:
    config = SchedulerConfig(num_blocks=64, max_model_len=512, enable_prefix_caching=False)
    with pytest.raises(ValueError, match="counts_only"):
        Scheduler(config).advance(1)
    simulation = Simulation(replace(config, counts_only=True), [(0, 8, 500, 500)] * 3, in_bulk=False)
    simulation.arrivals.clear()
    for _ in range(3):
        simulation.arrive(8, 500, 500)
    simulation.step()
    with pytest.raises(ValueError, match="no KV cache"):
        simulation.scheduler.advance(480)
