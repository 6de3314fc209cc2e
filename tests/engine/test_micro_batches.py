"""Steps of a pipeline: whoever is in flight, everyone is served, evenly, and nobody reads what is not written."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.micro_batches import row_limit
from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler_config import SchedulerConfig
from tests.engine.fake_ranks import FakeExecutor, next_token

ROOMY = {"num_blocks": 256, "block_size": 4, "max_model_len": 64}


def make_core(num_stages: int, steps: int, **limits: int | bool) -> EngineCore:
    config = SchedulerConfig(**{**ROOMY, "max_steps_in_flight": steps, **limits})  # type: ignore[arg-type]
    executor = FakeExecutor(config.block_size, config.num_groups, num_stages=num_stages)
    return EngineCore(config, executor, lambda: 0.0)


def add(core: EngineCore, prompt: list[int], max_tokens: int) -> Request:
    return core.add("r", 0, prompt, SamplingParams(max_tokens=max_tokens))


def expected_output(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def step_sizes(core: EngineCore, group: int = 0) -> list[int]:
    return [len(step.groups[group].seq_ids) for step in core.executor.steps]  # type: ignore[attr-defined]


@given(st.integers(0, 200), st.integers(1, 8))
def test_free_sequences_are_shared_out_evenly(num_sequences: int, max_steps: int) -> None:
    sizes: list[int] = []
    for _ in range(max_steps):
        sizes.append(min(num_sequences - sum(sizes), row_limit(num_sequences, sizes, max_steps)))
    assert sum(sizes) == num_sequences
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=100, deadline=None)
@given(num_sequences=st.integers(1, 24), steps=st.integers(2, 5), num_groups=st.integers(1, 3), late=st.integers(0, 12))
def test_requests_that_come_and_go_leave_an_even_spread(
    num_sequences: int, steps: int, num_groups: int, late: int
) -> None:
    core = make_core(steps, steps, num_groups=num_groups, enable_prefix_caching=False)
    requests = [add(core, [number], 40) for number in range(num_sequences)]
    core.pump()
    for group, running in enumerate(core.scheduler.groups):
        opened = step_sizes(core, group)
        assert sum(opened) == len(running.running)
        assert max(opened) - min(opened) <= 1
    requests += [add(core, [number], 40) for number in range(late)]
    for request in requests[::3]:
        core.finish(request, FinishReason.ABORT)
    for _ in range(3 * steps):  # the steps in flight, then a round in which the spread is mended
        core.pump()
    last = core.executor.steps[-steps:]  # type: ignore[attr-defined]
    for group, state in enumerate(core.scheduler.groups):
        sizes = [len(step.groups[group].seq_ids) for step in last]
        if len(state.running) >= steps:
            assert sum(sizes) == len(state.running)
            assert max(sizes) - min(sizes) <= 1


def test_a_full_pipeline_has_a_step_for_every_stage() -> None:
    core = make_core(3, 3)
    requests = [add(core, [number] * 5, 8) for number in range(9)]
    for _ in range(6):
        core.pump()
        assert core.scheduler.num_in_flight == 3
    assert set(step_sizes(core)) == {3}
    while core.has_work:
        core.pump()
    assert [request.num_output_tokens for request in requests] == [8] * 9


def test_the_chunks_of_a_prompt_fill_the_pipeline() -> None:
    """A chunk that does not end the prompt samples nothing, so that the next need not wait for it."""
    core = make_core(4, 4, num_blocks=16, max_model_len=64, max_num_batched_tokens=8)
    request = add(core, list(range(40)), 3)
    core.pump()
    assert [batch.num_scheduled_tokens for step in core.executor.steps for batch in step.groups] == [[8]] * 4  # type: ignore[attr-defined]
    while core.has_work:
        core.pump()
    assert request.output_token_ids == expected_output(list(range(40)), 3)


def test_waiting_requests_that_do_not_fit_do_not_make_steps_uneven() -> None:
    """The cache holds four; the queue behind them must not let one step take all of these."""
    core = make_core(2, 2, num_blocks=16, max_model_len=16, enable_prefix_caching=False)
    for number in range(12):
        add(core, [number] * 13, 3)
    core.pump()
    assert step_sizes(core) == [2, 2]
    assert core.scheduler.num_waiting == 8
    while core.scheduler.num_waiting == 8 and not core.scheduler.throttled:
        core.pump()
    assert core.scheduler.throttled


def test_a_step_reads_what_a_step_in_flight_before_it_writes() -> None:
    core = make_core(3, 3)
    prompt = list(range(16))
    first = add(core, [*prompt, 1], 4)
    core.pump()
    second = add(core, [*prompt, 2], 4)
    core.pump()
    assert core.scheduler.num_in_flight == 2
    assert second.num_cached_tokens == 16  # written by a step that no stage but the first has computed
    while core.has_work:
        core.pump()  # the fake ranks check every slot that is read
    assert first.output_token_ids == expected_output([*prompt, 1], 4)
    assert second.output_token_ids == expected_output([*prompt, 2], 4)


def test_a_waiting_request_that_only_its_cached_prefix_lets_in_is_admitted() -> None:
    core = make_core(2, 2, num_blocks=8, max_model_len=32)
    prompt = list(range(20))
    add(core, prompt, 8)
    core.pump()
    second = add(core, [*prompt, 1], 2)  # six blocks, of which five are the first one's
    core.pump()
    assert second.first_scheduled_time is not None


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=16), min_size=1, max_size=16),
    num_stages=st.integers(2, 4),
    spare_steps=st.integers(0, 2),
    num_groups=st.integers(1, 3),
    num_blocks=st.integers(7, 40),
    budget=st.integers(1, 32),
    caching=st.booleans(),
)
def test_every_request_ends_with_the_output_it_would_have_alone(
    prompts: list[list[int]],
    num_stages: int,
    spare_steps: int,
    num_groups: int,
    num_blocks: int,
    budget: int,
    caching: bool,
) -> None:
    limits = {"num_blocks": num_blocks, "max_model_len": 28, "max_num_batched_tokens": budget}
    core = make_core(
        num_stages, num_stages + spare_steps, num_groups=num_groups, enable_prefix_caching=caching, **limits
    )
    requests = [add(core, prompt, 12) for prompt in prompts]
    turns = 0
    while core.has_work:
        core.pump()
        turns += 1
        assert turns < 10_000, "the engine does not come to rest"
        for group in core.scheduler.groups:
            group.kv.pool.check_integrity()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.output_token_ids == expected_output(prompt, 12)
    assert all(group.kv.pool.num_used == 0 for group in core.scheduler.groups)


@settings(max_examples=60, deadline=None)
@given(
    num_stages=st.integers(1, 4),
    num_blocks=st.integers(8, 24),
    budget=st.integers(2, 24),
    prompt_len=st.integers(1, 20),
    arrivals=st.integers(1, 3),
)
def test_a_stream_of_arrivals_starves_nobody(
    num_stages: int, num_blocks: int, budget: int, prompt_len: int, arrivals: int
) -> None:
    """Requests keep coming, faster than they can be served; the first ones end all the same."""
    assume(arrivals * prompt_len > budget / 2)
    core = make_core(num_stages, num_stages, num_blocks=num_blocks, max_model_len=32, max_num_batched_tokens=budget)
    first = [add(core, [number] * prompt_len, 10) for number in range(4)]
    for turn in range(2000):
        if turn % 2 == 0:
            for number in range(arrivals):
                add(core, [turn, number] * (prompt_len // 2 + 1), 2)
        core.pump()
        if all(request.finish_reason is FinishReason.LENGTH for request in first):
            return
    pytest.fail(f"{first} did not end")


def test_who_is_ended_from_outside_no_longer_counts_in_the_steps_in_flight() -> None:
    core = make_core(2, 2)
    requests = [add(core, [number], 40) for number in range(6)]
    core.pump()
    assert core.scheduler.sizes_in_flight(0) == [3, 3]
    core.finish(requests[0], FinishReason.ABORT)
    assert core.scheduler.sizes_in_flight(0) == [2, 3]
