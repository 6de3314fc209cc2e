"""KV figures of real engines, in states whose value is worked out on paper."""

from __future__ import annotations

import pytest

from ridgewalk.engine.request import FinishReason
from tests.metrics.builders import Clock, scrape, value
from tests.metrics.replicas import Replica, prompt


def starved(clock: Clock) -> Replica:
    """8 blocks: 4 for a prompt of 13, 3 for one of 9; one is left, and the third prompt, of 8 tokens, needs 2."""
    replica = Replica(clock, "0")
    for number, (length, max_tokens) in enumerate([(13, 3), (9, 3), (8, 1)]):
        replica.ask(prompt(length, number), max_tokens)
    return replica


def test_stranded_blocks_of_an_idle_replica_with_a_warm_prefix_cache() -> None:
    """Replica 0 throttles with a head of line of 2 blocks; there are 16 blocks in all.

    Replica 1 has served a prompt of 9 tokens: 2 blocks are cached, 6 are free, all 8 are available: 8 / 16.
    Then a sequence of 12 tokens uses the 2 cached ones and a third: 5 / 16. It grows by one, and one of 9 tokens takes
    3: 1 is left, in which the head does not fit: 0.
    """
    clock = Clock()
    full, idle = starved(clock), Replica(clock, "1")
    idle.ask(prompt(9, 7), 1)
    idle.run()
    assert idle.blocks() == (0, 2, 6)
    full.step()
    assert full.blocks() == (7, 0, 1)
    assert stranded(full, idle) == 8 / 16
    idle.ask(prompt(12, 7), 4)
    assert stranded(full, idle.step()) == 5 / 16
    idle.ask(prompt(9, 8), 2)
    assert idle.step().blocks() == (7, 0, 1)
    assert stranded(full, idle) == 0


def test_what_is_stranded_is_forgotten_5_s_after_the_last_throttling() -> None:
    clock = Clock()
    full, idle = starved(clock), Replica(clock, "1")
    full.step()
    clock.now += 5
    assert stranded(full, idle) == 0.5
    clock.now += 0.1
    assert stranded(full, idle) == 0


def test_nothing_is_stranded_once_the_head_of_line_was_admitted() -> None:
    clock = Clock()
    full, idle = starved(clock), Replica(clock, "1")
    full.step(3)
    assert stranded(full, idle) == 0.5
    full.step()  # the first two have ended
    assert full.value("num_requests_waiting") == 0
    assert stranded(full, idle) == 0


def test_blocks_are_stranded_between_the_attention_groups_of_one_replica_too() -> None:
    """Two groups of 4 blocks. Two sequences of 7 tokens share the first; at 9 tokens each wants a third block and one
    is preempted, its 9 tokens needing 3 blocks. The second group has its 4 blocks available: 4 / 8, until the next
    step admits the sequence there."""
    replica = Replica(Clock(), num_blocks=4, num_groups=2)
    for number, max_tokens in enumerate((9, 2, 9, 2)):  # to groups 0, 1, 0, 1
        replica.ask(prompt(7, number), max_tokens)
    replica.step(2)
    assert (replica.blocks(0)[0], replica.blocks(1)[0]) == (4, 4)
    assert replica.value("kv_stranded_ratio") == 0
    replica.step()
    assert replica.value("num_preemptions_total") == 1
    assert (replica.blocks(0)[0], replica.blocks(1)[0]) == (3, 0)
    assert replica.value("kv_stranded_ratio") == 4 / 8
    replica.step()
    assert replica.value("num_requests_waiting") == 0
    assert replica.value("kv_stranded_ratio") == 0


def test_groups_report_their_own_blocks_and_the_replica_their_sum() -> None:
    replica = Replica(Clock(), num_groups=2)
    replica.ask(prompt(10, 0), 3)
    replica.ask(prompt(5, 1), 1)
    replica.step()
    assert (replica.blocks(0), replica.blocks(1)) == ((3, 0, 5), (2, 0, 6))
    assert replica.value("kv_cache_usage_ratio") == 5 / 16
    assert replica.value("num_requests_running") == 2
    replica.step()
    assert replica.blocks(1) == (0, 1, 7)  # the one full block of 5 tokens can be found again
    assert replica.value("kv_cache_usage_ratio") == 3 / 16
    replica.run()
    assert replica.value("kv_cache_usage_ratio") == 0


def test_shared_prefix_blocks_count_once_in_internal_fragmentation() -> None:
    """10 tokens and 9 that share the first 8. Blocks: 2 shared and full, 1 with 2 of 4 slots filled, 1 with 1 of 4:
    11 of 16 slots. Counted by sequence it would be 19 of 24."""
    replica = Replica(Clock())
    replica.ask(prompt(10), 4)
    replica.ask([*prompt(8), 77], 4)
    replica.step()
    assert replica.blocks() == (4, 0, 4)
    assert replica.value("kv_internal_fragmentation_ratio") == 5 / 16
    replica.step()  # each fills one slot more
    assert replica.value("kv_internal_fragmentation_ratio") == 3 / 16
    assert replica.value("prefix_cache_queries_total") == 19
    assert replica.value("prefix_cache_hits_total") == 8


def test_a_chunk_not_computed_yet_is_unfilled() -> None:
    """A prompt of 14 tokens holds 4 blocks from its first chunk of 5 tokens on."""
    replica = Replica(Clock(), max_num_batched_tokens=5)
    replica.ask(prompt(14), 1)
    assert [replica.step().value("kv_internal_fragmentation_ratio") for _ in range(3)] == [11 / 16, 6 / 16, 2 / 16]
    assert replica.step().value("kv_internal_fragmentation_ratio") == 0  # it has ended: no block is used


@pytest.mark.parametrize(("caching", "recomputed"), [(False, 8), (True, 4)])
def test_recomputed_tokens_are_those_not_found_in_the_cache(caching: bool, recomputed: int) -> None:
    """Two sequences of 7 tokens in 4 blocks. Both have computed 8 when the first needs a third block: the second is
    preempted. Its two full blocks are cached, the later one is evicted for the first sequence, which ends at 12 tokens.
    Then the second starts again: from 0, or from the 4 tokens found. Token 9 was never computed before."""
    replica = Replica(Clock(), num_blocks=4, enable_prefix_caching=caching)
    replica.ask(prompt(7, 1), 5)
    second = replica.ask(prompt(7, 2), 5)
    replica.run()
    assert second.num_preemptions == 1
    assert replica.value("num_preemptions_total") == 1
    assert replica.value("recomputed_tokens_total") == recomputed
    # Each computes its 7 prompt tokens and 4 of its 5 outputs, and steps know nothing of recomputation.
    computed = sum(step.num_tokens for step in replica.core.executor.steps)  # type: ignore[attr-defined]
    assert computed == 2 * 11 + recomputed
    assert replica.value("generation_tokens_total") == 10
    assert replica.value("prompt_tokens_total") == 14
    assert replica.value("prefix_cache_hits_total") == 0  # of prompts when first admitted


def test_time_is_throttled_while_a_sequence_waits_for_blocks_alone() -> None:
    """Steps of 0.5 s: the third sequence waits for the three steps that the first two take."""
    clock = Clock()
    replica = starved(clock)
    replica.step(3, seconds=0.5)
    assert replica.value("kv_throttled_seconds_total") == 1.0  # what has passed until the last look
    replica.step(1, seconds=0.5)
    assert replica.value("kv_throttled_seconds_total") == 1.5
    replica.run()
    clock.now += 10
    assert replica.step().value("kv_throttled_seconds_total") == 1.5


def test_time_without_a_seat_is_not_throttled() -> None:
    clock = Clock()
    replica = Replica(clock, max_num_seqs=1)
    replica.ask(prompt(4, 0), 3)
    replica.ask(prompt(4, 1), 1)
    replica.step(3, seconds=0.5)
    assert replica.value("num_requests_waiting") == 1
    assert replica.value("kv_throttled_seconds_total") == 0


def test_the_capacity_trap_closes_and_opens_again() -> None:
    """Eight short sequences decode at 8 tokens a step. Then a prompt of 40 tokens takes 10 of 16 blocks, another waits
    for 10 more: one token a step. Its FLOPs are at most 3328 + 64 * 56 against 8 * (3328 + 64 * 4) before: under a
    quarter. Nothing is said of the window that holds its prompt."""
    clock = Clock()
    replica = Replica(clock, num_blocks=16)
    for number in range(8):
        replica.ask(prompt(2, number), 6)
    replica.step(7, seconds=0.25)
    assert replica.core.has_work is False
    assert trapped(replica) == 0
    long = replica.ask(prompt(40, 1), 16)
    replica.ask(prompt(40, 2), 2)
    replica.step(2, seconds=0.25)
    assert trapped(replica) is None
    replica.step(5, seconds=0.25)
    assert trapped(replica) == 1
    replica.core.finish(long, FinishReason.ABORT)
    replica.step(6, seconds=0.25)
    assert replica.value("num_requests_waiting") == 0
    assert trapped(replica) == 0


def trapped(replica: Replica) -> float | None:
    return replica.value("capacity_trap", model_name="m")


def stranded(*replicas: Replica) -> float | None:
    return value(scrape(*(replica.metrics for replica in replicas)), "kv_stranded_ratio", model_name="m")
