"""Admission by the predicted peak: what is learned of lengths, and what is decided by it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.output_lengths import MAX_CLASSES, MEMORY, OutputLengths, length_grid
from ridgewalk.engine.predictive_admission import REFRESH_EVERY, PredictiveAdmission
from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.sampling import ReasoningBudget, SamplingParams
from ridgewalk.engine.scheduler_config import SchedulerConfig
from tests.engine.fake_ranks import FakeExecutor

STOPS = SamplingParams(max_tokens=4096, stop_token_ids=(1,))


def request(num_output: int, sampling: SamplingParams = STOPS, num_prompt: int = 100, resumed: int = 0) -> Request:
    made = Request(0, "r", 0, [5] * (num_prompt + resumed), num_prompt, sampling)
    made.token_ids += [5] * (num_output - resumed)
    return made


def ended(num_output: int, reason: FinishReason = FinishReason.STOP, **fields: object) -> Request:
    made = request(num_output, **fields)  # type: ignore[arg-type]
    made.finish_reason = reason
    return made


def chance(lengths: OutputLengths, of: Request, more: int) -> float:
    return float(lengths.survival([of], np.array([of.num_output_tokens]), np.array([more]))[0, 0])


def learned(*requests: Request, running: tuple[Request, ...] = ()) -> OutputLengths:
    lengths = OutputLengths(8192)
    for each in requests:
        lengths.observe(each)
    lengths.refresh(running)
    return lengths


def test_before_anything_is_seen_a_quarter_of_max_tokens_is_expected() -> None:
    curve = [chance(learned(), request(0), more) for more in range(0, 4097, 64)]
    assert sum(curve) * 64 == pytest.approx(1024, rel=0.1)
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.001


def test_the_curve_is_that_of_the_lengths_seen_and_conditioned_on_what_was_written() -> None:
    rng = np.random.default_rng(0)
    seen = rng.integers(1, 1000, size=400)
    lengths = learned(*(ended(int(length)) for length in seen))
    for have, more in [(0, 300), (0, 900), (500, 200), (500, 400)]:
        expected = (seen > have + more).sum() / (seen > have).sum()
        assert chance(lengths, request(have), more) == pytest.approx(expected, abs=0.04)


def test_requests_that_were_cut_or_still_run_make_outputs_longer_and_not_shorter() -> None:
    """Short outputs end first: who took ended ones alone would think that all are short."""
    short = [ended(100) for _ in range(20)]
    naive = chance(learned(*short), request(0), 200)
    running = tuple(request(150) for _ in range(60))
    aborted = [ended(150, FinishReason.ABORT) for _ in range(60)]
    capped = [ended(150, FinishReason.LENGTH, sampling=SamplingParams(max_tokens=4000, stop_token_ids=(1,)))] * 60
    assert naive < 0.1
    for lengths in (learned(*short, running=running), learned(*short, *aborted), learned(*short, *capped)):
        assert chance(lengths, request(0), 140) == pytest.approx(60 / 80, abs=0.05)


def test_a_resumed_request_says_nothing_of_the_lengths_that_it_came_with() -> None:
    short = [ended(100) for _ in range(20)]
    lengths = learned(*short, *(ended(900, resumed=600) for _ in range(200)))
    assert chance(lengths, request(0), 200) < 0.1


def test_lengths_told_by_others_are_estimated_like_those_of_requests() -> None:
    running = [request(40, resumed=10), request(900), request(7, num_prompt=5), request(300, num_prompt=5)]
    of_requests, of_others = learned(ended(120), running=tuple(running)), learned(ended(120))
    of_others.refresh_with((each.length_class, each.num_resumed_tokens, each.num_output_tokens) for each in running)
    for each in running:
        assert (of_requests.curve(each.length_class) == of_others.curve(each.length_class)).all()


def test_of_many_requests_each_has_its_own_chances() -> None:
    lengths = learned(ended(120), ended(700), ended(30, num_prompt=5))
    unstoppable = SamplingParams(max_tokens=4096)
    asked = [request(40), request(7, num_prompt=5), request(900), request(12, sampling=unstoppable)]
    times = np.array([0, 3, 200, 5000], dtype=np.int32)
    together = lengths.survival(asked, np.array([each.num_output_tokens for each in asked], dtype=np.int32), times)
    assert together.tolist() == [[chance(lengths, each, int(more)) for more in times] for each in asked]
    assert together[3].tolist() == [1.0] * 4


def test_a_class_that_has_seen_little_leans_on_the_wider_one() -> None:
    low = SamplingParams(max_tokens=4096, stop_token_ids=(1,), reasoning_effort="low")
    high = SamplingParams(max_tokens=4096, stop_token_ids=(1,), reasoning_effort="high")
    lengths = learned(
        *(ended(200, sampling=low) for _ in range(100)), *(ended(3000, sampling=high) for _ in range(100))
    )
    assert chance(lengths, request(0, low), 1000) < 0.1
    assert chance(lengths, request(0, high), 1000) > 0.9
    unseen = request(0, SamplingParams(max_tokens=4096, stop_token_ids=(1,), reasoning_effort="medium"))
    assert 0.3 < chance(lengths, unseen, 1000) < 0.7


def test_a_thinking_budget_is_part_of_the_class() -> None:
    plain = request(0).length_class
    small, large = (
        request(0, SamplingParams(max_tokens=4096, reasoning=ReasoningBudget(limit, 2, 3))).length_class
        for limit in (100, 3000)
    )
    assert len({plain, small, large}) == 3


def test_who_has_no_stop_token_runs_to_the_limit() -> None:
    lengths = learned(*(ended(10) for _ in range(100)))
    assert chance(lengths, request(0, SamplingParams(max_tokens=4096)), 4000) == 1.0


def test_memory_is_bounded_and_old_lengths_are_forgotten() -> None:
    lengths = OutputLengths(256)
    for number in range(MEMORY + 2000):
        prompt, limit = 1 + 4 ** (number % 10), 1 + 2 ** (number // 10 % 18)
        effort = str(number // 180 % 7)  # more of them than clients may name
        params = SamplingParams(max_tokens=limit, stop_token_ids=(1,), reasoning_effort=effort)
        lengths.observe(ended(1, sampling=params, num_prompt=1 if prompt > 1000 else prompt))
    assert len(lengths._counts) <= MAX_CLASSES
    assert lengths._counts[()][1].sum() < MEMORY


def make_core(**limits: object) -> EngineCore:
    config = SchedulerConfig(
        **{"num_blocks": 32, "block_size": 4, "max_model_len": 128, "admission": "predictive", **limits}  # type: ignore[arg-type]
    )
    return EngineCore(config, FakeExecutor(config.block_size, config.num_groups), lambda: 0.0)


def add(core: EngineCore, num_prompt: int, max_tokens: int, **fields: object) -> Request:
    prompt = [len(core.scheduler._requests) + 2, *[7] * (num_prompt - 1)]
    return core.add("r", 0, prompt, SamplingParams(max_tokens=max_tokens, **fields))  # type: ignore[arg-type]


def test_a_request_waits_while_the_peak_would_not_fit_although_its_prompt_does() -> None:
    core = make_core()
    first, second = add(core, 8, 80), add(core, 8, 80)
    core.pump()
    assert (first.status.value, second.status.value) == ("running", "waiting")
    assert core.scheduler.throttled
    assert core.stats().groups[0].predicted_peak_blocks == pytest.approx(22)  # 8 + 80 - 1 tokens
    while core.has_work:
        core.pump()
    assert core.scheduler.counters.num_preemptions == 0


@settings(max_examples=25, deadline=None)
@given(
    loads=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 80), st.integers(0, 30)), min_size=2, max_size=25),
    blocks=st.integers(32, 90),
)
def test_a_glance_at_the_last_peak_refuses_nobody_who_would_fit(loads: list[tuple[int, int, int]], blocks: int) -> None:
    """Admission with it and without it admit the same requests at the same steps."""
    quick, thorough = make_core(num_blocks=blocks), make_core(num_blocks=blocks)
    thorough.scheduler.admission._exceeds = lambda *asked: False  # type: ignore[attr-defined]
    waiting = [sorted(loads, key=lambda load: load[2]) for _ in range(2)]
    step = 0
    while any(waiting) or quick.has_work:
        for core, queue in zip((quick, thorough), waiting, strict=True):
            while queue and queue[0][2] <= step:
                num_prompt, max_tokens, _ = queue.pop(0)
                add(core, num_prompt, max_tokens, stop_token_ids=(1,))
            core.pump()
        running = [[each.seq_id for each in core.scheduler.groups[0].running] for core in (quick, thorough)]
        assert running[0] == running[1]
        step += 1
    assert not thorough.has_work


def test_who_is_almost_done_leaves_room_for_the_next() -> None:
    core = make_core()
    first = add(core, 8, 80)
    for _ in range(70):
        core.pump()
    second = add(core, 8, 80)
    core.pump()
    assert second.status.value == "running"  # the peaks of the two do not meet
    while core.has_work:
        core.pump()
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)


def test_the_head_of_the_queue_begins_when_its_group_is_idle_whatever_is_predicted() -> None:
    """And nobody passes it: so it waits no longer than the longest of those that run before it."""

    class Pessimist(OutputLengths):
        def limits(self, requests: Sequence[Request]) -> list[int]:
            return [10**6] * len(requests)

    core = make_core()
    core.scheduler.admission = PredictiveAdmission(core.scheduler.config, Pessimist(128))
    requests = [add(core, 30, 20) for _ in range(4)]
    order: list[Request] = []
    for _ in range(4 * 23):
        running = [each for each in requests if each.status.value == "running"]
        assert len(running) <= 1  # two would fit, but for what is predicted
        order += [each for each in running if each not in order]
        core.pump()
    assert order == requests
    assert not core.has_work


def test_the_victim_is_who_loses_least_former_losses_included() -> None:
    policy = PredictiveAdmission(SchedulerConfig(num_blocks=256))
    old, young, unlucky = request(500), request(40), request(10)
    for each in (old, young, unlucky):
        each.num_computed_tokens = each.num_tokens
    assert policy.victim([old, young, unlucky]) is unlucky
    unlucky.num_lost_tokens = 1000
    assert policy.victim([old, young, unlucky]) is young


def test_a_shared_prefix_is_predicted_once() -> None:
    core = make_core(num_blocks=32)
    prompt = list(range(2, 66))  # 16 blocks
    core.add("r", 0, prompt, SamplingParams(max_tokens=30))
    core.pump()
    second = core.add("r", 1, [*prompt, 1], SamplingParams(max_tokens=30))
    core.pump()
    assert second.status.value == "running"  # 24 + 24 blocks would not fit
    peak = core.stats().groups[0].predicted_peak_blocks
    assert peak is not None
    assert peak <= 32


def test_forecasts_are_made_when_they_are_due_and_not_at_every_step() -> None:
    core = make_core(num_blocks=64, max_model_len=256)
    policy = core.scheduler.admission
    assert isinstance(policy, PredictiveAdmission)
    made = []
    forecast = policy._forecast
    policy._forecast = lambda *asked: made.append(asked) or forecast(*asked)  # type: ignore[method-assign, func-returns-value]
    add(core, 8, 200)
    add(core, 8, 200)
    for _ in range(REFRESH_EVERY * 10):
        core.pump()
    whole = [asked for asked in made if len(asked) == 1]
    assert 10 <= len(whole) <= 13
    assert 1 <= len(made) - len(whole) <= 13  # glances at one time of the grid


@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60), st.integers(0, 12)), min_size=1, max_size=10),
    num_blocks=st.integers(20, 40),
)
def test_lengths_that_are_certain_never_preempt(arrivals: list[tuple[int, int, int]], num_blocks: int) -> None:
    """Without stop tokens every request runs to its ``max_tokens``, so the predicted peak is an upper bound."""
    core = make_core(num_blocks=num_blocks, max_model_len=80, enable_prefix_caching=False)
    for num_prompt, max_tokens, gap in arrivals:
        add(core, num_prompt, max_tokens)
        for _ in range(gap):
            core.pump()
    while core.has_work:
        core.pump()
    assert core.scheduler.counters.num_preemptions == 0


@given(longest=st.integers(1, 10**6), step=st.integers(1, 64), growth=st.floats(1.0, 2.0))
@settings(max_examples=30, deadline=None)
def test_the_grid_rises_from_nothing_to_the_longest(longest: int, step: int, growth: float) -> None:
    grid = length_grid(min(longest, 2000) if growth < 1.01 else longest, step, growth)
    assert grid[0] == 0
    assert (np.diff(grid) > 0).all()
