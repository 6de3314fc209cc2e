"""What preempted requests had is kept on the host while others use its place."""

from __future__ import annotations

import pytest

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.kv_cache_manager import KVCacheManager
from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.step import BlockCopy
from ridgewalk.engine.swap_space import SwapSpace
from tests.engine.fake_ranks import FakeExecutor


def content(number: int) -> bytes:
    return bytes([number])


def test_only_what_somebody_waits_for_is_copied_and_each_content_once() -> None:
    swap = SwapSpace(4)
    swap.expect(7, [content(1), content(2)])
    for block, number in ((10, 0), (11, 1), (12, 1), (13, 2)):
        swap.on_evicted(block, content(number))
    assert swap.take_copies() == [BlockCopy(True, 11, 0), BlockCopy(True, 13, 1)]
    assert not swap.holds(content(0))
    swap.restore(swap.claim(content(1)), 20)
    assert swap.take_copies() == [BlockCopy(False, 20, 0)]
    swap.check_integrity()
    swap.forget(7)
    assert swap.num_used == 0
    swap.check_integrity()


def test_a_full_space_gives_up_what_was_copied_first() -> None:
    swap = SwapSpace(2)
    swap.expect(1, [content(number) for number in range(3)])
    for number in (2, 1, 0):  # the end of a request is evicted first
        swap.on_evicted(number, content(number))
    assert [swap.holds(content(number)) for number in range(3)] == [True, True, False]
    swap.check_integrity()


def test_what_two_wait_for_is_kept_until_both_have_left() -> None:
    swap = SwapSpace(2)
    for seq_id in (1, 2):
        swap.expect(seq_id, [content(5)])
    swap.on_evicted(3, content(5))
    swap.forget(1)
    assert swap.holds(content(5))
    swap.forget(2)
    swap.forget(2)
    assert not swap.holds(content(5))


def test_evictions_for_a_request_do_not_take_the_place_of_what_it_claimed() -> None:
    swap = SwapSpace(1)
    swap.expect(1, [content(1)])
    swap.expect(2, [content(2)])
    swap.on_evicted(9, content(1))
    claimed = swap.claim(content(1))
    swap.on_evicted(4, content(2))
    assert not swap.holds(content(2))
    swap.restore(claimed, 4)
    swap.on_evicted(5, content(2))
    assert swap.take_copies() == [BlockCopy(True, 9, 0), BlockCopy(False, 4, 0), BlockCopy(True, 5, 0)]


def admitted(kv: KVCacheManager, seq_id: int, token_ids: list[int]) -> Request:
    """A request that has computed all its tokens."""
    request = Request(seq_id, "r", 0, token_ids, len(token_ids), SamplingParams(max_tokens=4))
    kv.admit(request, kv.find_prefix(request))
    kv.publish_computed(request, len(token_ids))
    return request


def test_a_beginning_that_others_used_longer_is_kept_all_the_same() -> None:
    """Four blocks, of which the first two are somebody else's too until after the preemption; the host holds two."""
    kv = KVCacheManager(6, block_size=2, num_swap_blocks=2)
    waiting = admitted(kv, 1, [1, 1, 1, 1, 2, 2, 3, 3])
    sharing = admitted(kv, 2, [1, 1, 1, 1, 4, 4])
    kv.release(waiting, awaited=True)
    kv.release(sharing)
    assert kv.pool.allocate(5) is not None
    hit = kv.find_prefix(waiting)
    assert (hit.num_tokens, hit.num_on_host, hit.num_in_cache, hit.num_shared) == (6, 2, 1, 0)
    kv.swap.check_integrity()
    kv.pool.check_integrity()


def two_long_ones(num_swap_blocks: int, **changes: object) -> tuple[EngineCore, list[Request]]:
    """Room for 32 tokens, and two requests that come to 24 each: the second is preempted."""
    fields: dict[str, object] = {"num_blocks": 8, "block_size": 4, "max_model_len": 32, **changes}
    config = SchedulerConfig(num_swap_blocks=num_swap_blocks, **fields)  # type: ignore[arg-type]
    core = EngineCore(config, FakeExecutor(config.block_size), lambda: 0.0)
    requests = [core.add("r", index, [index] * 4, SamplingParams(max_tokens=20)) for index in range(2)]
    return core, requests


def run(core: EngineCore) -> None:
    while core.has_work:
        core.pump()


@pytest.mark.parametrize(("num_swap_blocks", "recomputed"), [(0, 8), (1, 4), (2, 0), (8, 0)])
def test_a_preempted_request_recomputes_only_what_was_not_kept(num_swap_blocks: int, recomputed: int) -> None:
    """It had four whole blocks, of which the first needs two before it ends."""
    core, requests = two_long_ones(num_swap_blocks)
    run(core)
    swap, counters = core.scheduler.groups[0].kv.swap, core.scheduler.counters
    assert [request.num_preemptions for request in requests] == [0, 1]
    assert counters.recomputed_tokens == recomputed
    assert swap.num_copied_in == min(num_swap_blocks, 2)
    assert swap.num_used == 0
    assert core.stats().swapped_in_blocks == swap.num_copied_in


def test_who_leaves_while_it_waits_leaves_nothing_on_the_host() -> None:
    core, requests = two_long_ones(8)
    swap = core.scheduler.groups[0].kv.swap
    while not swap.num_used:
        core.pump()
    core.finish(requests[1], FinishReason.ABORT)
    assert swap.num_used == 0
    swap.check_integrity()
    run(core)


def test_it_needs_what_finds_blocks_again() -> None:
    with pytest.raises(ValueError, match="swap_space needs enable_prefix_caching"):
        two_long_ones(1, enable_prefix_caching=False)
    with pytest.raises(ValueError, match="counts_only"):
        two_long_ones(1, counts_only=True)
