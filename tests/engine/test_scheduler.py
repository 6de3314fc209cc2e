"""The scheduler's decisions, each in the smallest state that shows it."""

from __future__ import annotations

import pytest

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler import RequestTooLargeError
from ridgewalk.engine.scheduler_config import SchedulerConfig
from tests.engine.fake_ranks import FakeExecutor, next_token


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_core(clock: Clock | None = None, **limits: int | bool) -> EngineCore:
    config = SchedulerConfig(**{"num_blocks": 8, "block_size": 4, "max_model_len": 32, **limits})  # type: ignore[arg-type]
    return EngineCore(config, FakeExecutor(config.block_size, config.num_groups), clock or Clock())


def add(core: EngineCore, prompt: list[int], max_tokens: int = 4, **sampling: object) -> Request:
    return core.add("r", 0, prompt, SamplingParams(max_tokens=max_tokens, **sampling))  # type: ignore[arg-type]


def run(core: EngineCore) -> None:
    while core.has_work:
        core.pump()


def scheduled(core: EngineCore, step: int) -> dict[int, int]:
    batch = core.executor.steps[step].groups[0]  # type: ignore[attr-defined]
    return dict(zip(batch.seq_ids, batch.num_scheduled_tokens, strict=True))


def test_a_long_prompt_is_chunked_and_does_not_stop_others_decoding() -> None:
    core = make_core(num_blocks=32, max_model_len=64, max_num_batched_tokens=5)
    short, long = add(core, [1, 2], 6), add(core, list(range(20)), 2)
    run(core)
    assert scheduled(core, 0) == {short.seq_id: 2, long.seq_id: 3}
    assert scheduled(core, 1) == {short.seq_id: 1, long.seq_id: 4}
    assert len(short.output_token_ids) == 6


def test_second_request_reuses_the_prefix_of_the_first() -> None:
    core = make_core()
    prompt = list(range(10))
    add(core, prompt, 1)
    run(core)
    second = add(core, prompt, 1)
    run(core)
    assert second.num_cached_tokens == 8
    assert core.scheduler.counters.prefix_cache_hits == 8
    assert core.scheduler.counters.prefix_cache_queries == 20


def test_a_fully_cached_prompt_still_computes_its_last_block() -> None:
    core = make_core()
    for _ in range(2):
        request = add(core, list(range(8)), 1)
        run(core)
    assert request.num_cached_tokens == 4  # the last token must be computed to have logits


def test_the_last_admitted_is_preempted_and_its_recomputation_counted() -> None:
    core = make_core(num_blocks=4, max_model_len=16, enable_prefix_caching=False)
    first, second = add(core, [1] * 7, 9), add(core, [2] * 7, 9)
    run(core)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    # both had 9 tokens when a fifth block was wanted: the 8 computed ones of the victim are computed again
    assert core.scheduler.counters.recomputed_tokens == 8
    assert len(second.output_token_ids) == 9


def test_what_a_preempted_request_had_outlives_what_others_leave_behind() -> None:
    core = make_core(num_blocks=6, max_model_len=24)
    first, second = add(core, [1] * 7, 14), add(core, [2] * 7, 9)
    while not second.num_preemptions:
        core.pump()
    while first.finish_reason is None:  # it grows into the three blocks of the other, last one first
        core.pump()
    core.pump()
    assert second.num_computed_tokens > 0
    assert core.scheduler.counters.recomputed_tokens < second.num_lost_tokens


@pytest.mark.parametrize("at_end", [FinishReason.ABORT, None])
def test_nobody_awaits_the_blocks_of_a_preempted_request_that_left_or_returned(at_end: FinishReason | None) -> None:
    core = make_core(num_blocks=4, max_model_len=16)
    add(core, [1] * 7, 9)
    second = add(core, [2] * 7, 9)
    while not second.num_preemptions:
        core.pump()
    if at_end:
        core.finish(second, at_end)
    run(core)
    pool = core.scheduler.groups[0].kv.pool
    assert pool.num_available == 4
    assert not pool._awaited


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    core = make_core(num_blocks=4, max_model_len=16, enable_prefix_caching=False)
    first, second = add(core, [1] * 7, 9), add(core, [2] * 7, 9)
    core.pump()
    late = add(core, [3], 1)
    while not second.num_preemptions:
        late.first_scheduled_time = None if late.status.value == "waiting" else late.first_scheduled_time
        core.pump()
    last = core.executor.steps[-1].groups[0]  # type: ignore[attr-defined]
    assert last.seq_ids == [first.seq_id]


@pytest.mark.parametrize("at_step", range(1, 5))
def test_abort_frees_blocks_within_one_step(at_step: int) -> None:
    core = make_core(enable_prefix_caching=False)
    request = add(core, list(range(10)), 8)
    for _ in range(at_step):
        core.pump()
    assert core.finish(request, FinishReason.ABORT)
    core.pump()
    assert core.scheduler.groups[0].kv.pool.num_free == 8
    assert not core.finish(request, FinishReason.ABORT)


def test_stop_token_ends_a_request_but_not_before_min_tokens() -> None:
    prompt = [1, 2, 3]
    first = next_token(prompt)
    second = next_token([*prompt, first])
    core = make_core()
    early = add(core, prompt, 4, stop_token_ids=(first, second))
    late = add(core, prompt, 4, stop_token_ids=(first, second), min_tokens=2)
    run(core)
    assert (early.output_token_ids, early.finish_reason, early.stop_token_id) == ([first], FinishReason.STOP, first)
    assert (late.output_token_ids, late.finish_reason, late.stop_token_id) == (
        [first, second],
        FinishReason.STOP,
        second,
    )


def test_a_request_that_can_never_fit_is_refused_with_its_numbers() -> None:
    core = make_core()
    with pytest.raises(RequestTooLargeError, match=r"30 tokens and max_tokens is 3.*32 tokens"):
        add(core, [0] * 30, 3)


def test_a_resumed_request_continues_where_it_was() -> None:
    core = make_core()
    whole = add(core, [5, 6], 6)
    run(core)
    resumed = core.add("r", 0, [5, 6], SamplingParams(max_tokens=6), whole.output_token_ids[:4])
    run(core)
    assert resumed.output_token_ids == whole.output_token_ids
    assert resumed.num_output_tokens == 6


def test_time_waiting_for_kv_alone_is_accounted() -> None:
    clock = Clock()
    core = make_core(clock, num_blocks=4, max_model_len=16, enable_prefix_caching=False)
    add(core, [1] * 12, 4)
    add(core, [2] * 12, 4)
    steps = 0
    while core.has_work:
        core.pump()
        clock.now += 1
        steps += 1
    # the second waits from the first schedule until the first request has ended, four steps later
    assert core.throttled_seconds == 4
    assert steps > 8


def test_waiting_for_a_seat_is_not_throttling() -> None:
    clock = Clock()
    core = make_core(clock, max_num_seqs=1)
    add(core, [1], 4)
    add(core, [2], 4)
    while core.has_work:
        core.pump()
        clock.now += 1
    assert core.throttled_seconds == 0


def test_groups_of_a_replica_step_together_and_share_the_load() -> None:
    core = make_core(num_groups=2)
    requests = [add(core, [i] * 5, 3) for i in range(4)]
    run(core)
    assert {request.group for request in requests} == {0, 1}
    assert all(len(step.groups) == 2 for step in core.executor.steps)  # type: ignore[attr-defined]


def test_a_prefix_that_all_share_does_not_draw_all_to_one_group() -> None:
    core = make_core(num_groups=2, num_blocks=400, max_model_len=64)
    system_prompt = list(range(100, 116))
    requests = [add(core, [*system_prompt, number], 12) for number in range(64)]
    core.pump()
    running = [len(group.running) for group in core.scheduler.groups]
    assert sum(running) == 64
    assert max(running) <= 36
    run(core)
    assert sum(request.num_cached_tokens for request in requests) >= 60 * 16  # each group computes the prefix once


def test_a_long_prefix_draws_a_request_to_the_group_that_has_it() -> None:
    core = make_core(num_groups=2, num_blocks=40, max_model_len=64)
    first = add(core, list(range(40)), 2)
    run(core)
    bystander = add(core, list(range(50, 58)), 8)
    core.pump()
    assert bystander.group != first.group  # nothing runs: the group with more free blocks
    follower = add(core, [*range(40), 1], 2)
    core.pump()
    assert (follower.group, follower.num_cached_tokens) == (first.group, 40)


def test_steps_scheduled_ahead_carry_placeholders_and_change_nothing() -> None:
    plain, ahead = make_core(), make_core(max_steps_in_flight=2, schedule_ahead=True)
    outputs = []
    for core in (plain, ahead):
        request = add(core, [7, 8, 9], 8)
        run(core)
        outputs.append(request.output_token_ids)
    assert outputs[0] == outputs[1]
    assert any(-2 in step.groups[0].last_token_ids for step in ahead.executor.steps)  # type: ignore[attr-defined]


def test_internal_fragmentation_counts_unfilled_slots_once() -> None:
    core = make_core()
    add(core, list(range(9)), 4)
    add(core, list(range(9)), 4)
    core.pump()
    group = core.stats().groups[0]
    assert group.used_blocks == 4  # two shared and full, one each of their own
    assert group.unfilled_slots == 2 * 3


def test_limits_that_cannot_work_name_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"max_model_len 4096.*--max-model-len"):
        SchedulerConfig(num_blocks=8)
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1"):
        SchedulerConfig(num_blocks=800, max_num_seqs=0)


def test_generated_blocks_can_be_found_also_when_steps_are_scheduled_ahead() -> None:
    core = make_core(num_blocks=16, max_steps_in_flight=2, schedule_ahead=True)
    first = add(core, [1, 2, 3], 12)
    run(core)
    second = add(core, [*first.token_ids[:-1], 7], 1)  # the last token's KV was never computed
    run(core)
    assert second.num_cached_tokens == 12


def test_a_request_whose_junior_is_in_flight_waits_instead_of_being_preempted() -> None:
    """Two groups of tokens alternate, as micro-batches do: blocks of a request in flight are not free at once."""
    core = make_core(num_blocks=4, max_model_len=16, max_steps_in_flight=2, enable_prefix_caching=False)
    first, second = add(core, [1] * 7, 9), add(core, [2] * 7, 9)
    run(core)
    assert first.num_preemptions == 0
    assert second.num_preemptions >= 1
    assert core.throttled_seconds == 0  # the clock stands still; nothing was lost but steps
    assert (first.num_output_tokens, second.num_output_tokens) == (9, 9)
