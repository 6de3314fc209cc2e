"""Properties of the policy that follows KV growth, and what it does in situations small enough to see through."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgewalk.routing.decision import RoutingDecision, RoutingReason
from ridgewalk.routing.kv_growth import KvGrowth
from ridgewalk.routing.latency_slo import LatencySlo
from ridgewalk.routing.length_forecast import EASE
from ridgewalk.routing.prefix_index import PREFIX_BLOCK, prefix_hashes
from ridgewalk.routing.replica_load import ReplicaLoad
from tests.routing.builders import MAX_MODEL_LEN, PACES, finish, new, replica, send, taught, with_group

TAUGHT = taught()
"""Deciding changes nothing that a later decision could see, while nothing is sent or ends."""

loads = st.lists(
    st.builds(
        replica,
        replica_id=st.uuids().map(str),
        running=st.integers(0, 40),
        waiting=st.sampled_from([0, 0, 1, 9]),
        own=st.integers(0, 40),
        used=st.integers(0, 2000),
        total=st.just(2000),
        peak=st.none() | st.floats(0, 2500),
        placement=st.sampled_from(sorted(PACES)),
        seats=st.sampled_from([16, 64]),
        groups=st.sampled_from([1, 2]),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda load: load.replica_id,
)
requests = st.builds(new, effort=st.sampled_from(["high", "low", ""]), prompt=st.integers(1, 3000)).map(
    lambda one: [one]
)


def decide(policy: KvGrowth, candidates: list[ReplicaLoad], effort: str = "low", count: int = 1) -> RoutingDecision:
    decision = policy.choose([new(effort)] * count, candidates, 0.0)
    assert decision is not None
    return decision


@given(requests, loads)
def test_one_of_the_replicas_is_chosen_and_the_same_one_again(request: list, candidates: list[ReplicaLoad]) -> None:  # type: ignore[type-arg]
    decision = TAUGHT.choose(request, candidates, 0.0)
    assert decision is not None
    assert decision.replica_id in {load.replica_id for load in candidates}
    assert TAUGHT.choose(request, candidates, 0.0) == decision
    assert TAUGHT.choose(request, [], 0.0) is None


@given(requests, loads, st.data())
@settings(max_examples=200)
def test_more_load_never_makes_a_replica_more_attractive(
    request: list,  # type: ignore[type-arg]
    candidates: list[ReplicaLoad],
    data: st.DataObject,
) -> None:
    decision = TAUGHT.choose(request, candidates, 0.0)
    assert decision is not None
    loser = data.draw(st.sampled_from(candidates))
    if loser.replica_id == decision.replica_id:
        return
    more = data.draw(st.integers(1, 20))
    heavier = data.draw(
        st.sampled_from(
            [
                replace(loser, num_running=loser.num_running + more, num_own=loser.num_own + more),
                replace(loser, num_waiting=loser.num_waiting + more),
                replace(loser, num_own=loser.num_own + more),
                with_group(loser, available_blocks=max(0, loser.groups[0].available_blocks - more)),
                with_group(loser, predicted_peak_blocks=loser.groups[0].peak_blocks + more),
            ]
        )
    )
    again = TAUGHT.choose(request, [heavier if load is loser else load for load in candidates], 0.0)
    assert again is not None
    assert again.replica_id != loser.replica_id


@given(requests, loads)
def test_a_replica_that_would_run_out_of_kv_is_chosen_only_when_all_would(
    request: list,  # type: ignore[type-arg]
    candidates: list[ReplicaLoad],
) -> None:
    full = [with_group(load, available_blocks=0) for load in candidates]
    spared = replica("spared", running=15, used=1000, total=2000, seats=16)
    decision = TAUGHT.choose(request, [*full, spared], 0.0)
    assert decision is not None
    assert decision.replica_id == "spared"
    decision = TAUGHT.choose(request, full, 0.0)
    assert decision is not None
    if len(full) > 1:
        assert decision.reason is RoutingReason.ALL_FULL


@given(requests, st.lists(st.tuples(st.integers(0, 16), st.integers(0, 8)), min_size=2, max_size=5))
def test_before_anything_is_known_the_fewest_sequences_decide(request: list, queues: list[tuple[int, int]]) -> None:  # type: ignore[type-arg]
    alike = [
        replica(str(number), running, total=10**6, used=used, seats=16) for number, (running, used) in enumerate(queues)
    ]
    assert KvGrowth(MAX_MODEL_LEN).choose(request, alike, 0.0) == expected_of(alike)
    fresh = [replace(load, placement="TP2") for load in alike]
    assert TAUGHT.choose(request, fresh, 0.0) == expected_of(fresh)


def expected_of(alike: list[ReplicaLoad]) -> RoutingDecision:
    best = min(alike, key=lambda load: (load.num_sequences, -load.available_blocks))
    full = best.num_sequences + 1 > best.num_seats
    return RoutingDecision(best.replica_id, RoutingReason.ALL_FULL if full else RoutingReason.LEAST_LOADED)


def test_cold_seats_are_those_that_kv_has_room_for() -> None:
    """1,124 tokens are expected of each sequence."""
    one, two = replica("one group", total=280), replica("two groups", total=140, groups=2)  # room for 3, and 1 in each
    large = replica("large", running=2, total=8_000)
    policy = KvGrowth(MAX_MODEL_LEN)
    assert decide(policy, [two, one]) == RoutingDecision("one group", RoutingReason.LEAST_LOADED)
    assert decide(policy, [two, one, large], count=8) == RoutingDecision("large", RoutingReason.LEAST_LOADED)
    assert decide(policy, [two, one], count=8) == RoutingDecision("one group", RoutingReason.ALL_FULL)


def test_a_batch_that_comes_all_at_once_is_shared_out_by_the_kv_there_is() -> None:
    policy, sent = KvGrowth(MAX_MODEL_LEN), Counter[str]()
    totals = {"a": 1_000, "b": 1_000, "pooled": 8_000}  # blocks; 100 + 4,096 / 4 tokens are expected of each
    for _ in range(100):
        candidates = [replica(name, own=sent[name], total=total) for name, total in totals.items()]
        sent[decide_cold(policy, candidates)] += 1
    assert sent == {"a": 10, "b": 10, "pooled": 80}


def decide_cold(policy: KvGrowth, candidates: list[ReplicaLoad]) -> str:
    decision = decide(policy, candidates)
    assert decision.reason is RoutingReason.LEAST_LOADED
    return decision.replica_id


@pytest.mark.parametrize("effort", ["high", "low"])
def test_equal_replicas_get_equal_shares(effort: str) -> None:
    policy, sent = taught(), Counter[str]()
    for number in range(60):
        candidates = [replica(name, own=sent[name]) for name in "abc"]
        decision = policy.choose([new(effort)], candidates, number / 10)
        assert decision is not None
        assert decision.reason is RoutingReason.LEAST_DELAY
        send(policy, new(effort), decision.replica_id, number / 10)
        sent[decision.replica_id] += 1
    assert max(sent.values()) - min(sent.values()) <= 1


def mixed(policy: KvGrowth, busy: int = 165) -> list[ReplicaLoad]:
    """A group of four ranks that has long ones to write, beside two replicas of one rank with nothing to do."""
    for _ in range(busy):
        send(policy, new("high"), "pooled", -1.0).num_output_tokens = 500
    pooled = replica("pooled", busy, used=busy * 38, total=100_000, peak=33_000, placement="TP4", own=busy)
    return [pooled, replica("a", total=14_000), replica("b", total=14_000)]


def test_the_long_go_where_kv_is_pooled_and_the_short_where_no_rank_waits_for_another() -> None:
    policy = taught()
    candidates = mixed(policy)
    assert decide(policy, candidates, "high") == RoutingDecision("pooled", RoutingReason.POOLED_KV)
    assert decide(policy, candidates, "low") == RoutingDecision("a", RoutingReason.FEWER_RANKS)


def test_a_replica_about_to_run_out_of_kv_is_spared_however_fast_it_is() -> None:
    policy = taught()
    pooled, *others = mixed(policy)
    full = with_group(pooled, predicted_peak_blocks=104_000.0)
    decision = decide(policy, [full, *others], "high")
    assert decision.replica_id in ("a", "b")
    assert decision.reason is RoutingReason.KV_CLIFF
    # What was sent since the report counts: 40 long ones without a token yet, of some 190 blocks each.
    idle = replica("idle", total=6000)
    for _ in range(40):
        send(policy, new("high"), "idle", 0.0)
    busy = replica("busy", running=200, used=2000, total=100_000)
    assert decide(policy, [replace(idle, num_own=40), busy], "high").replica_id == "busy"


def test_a_peak_that_is_only_predicted_costs_a_wait_which_is_better_than_a_crowd() -> None:
    policy = taught()
    tight = replica("tight", running=3, used=200, total=1000, peak=995)  # blocks; a short one will have 16
    crowded = replica("crowded", running=200, used=9_000, total=100_000)
    decision = decide(policy, [tight, crowded], "low")
    assert decision == RoutingDecision("tight", RoutingReason.LEAST_DELAY)
    over = with_group(tight, predicted_peak_blocks=4000.0)
    assert decide(policy, [over, crowded], "low") == RoutingDecision("crowded", RoutingReason.KV_CLIFF)
    in_use = with_group(tight, available_blocks=15)
    assert decide(policy, [in_use, crowded], "low") == RoutingDecision("crowded", RoutingReason.KV_CLIFF)


def test_a_short_request_is_worth_its_own_pace_though_it_holds_up_long_ones() -> None:
    """By squared latency alone it would keep away from the fast group as soon as 120 long ones are there."""
    policy = taught()
    assert decide(policy, mixed(policy, busy=120), "low").replica_id == "pooled"
    policy = taught()
    assert decide(policy, mixed(policy, busy=250), "low").replica_id == "a"


def test_a_wait_for_kv_is_as_long_in_several_groups_as_in_one() -> None:
    """Of as much KV in all, and as much over: whether one group or four have it."""
    for groups in (1, 4):
        policy = taught()
        for _ in range(20):
            send(policy, new("high"), "tight", -1.0).num_output_tokens = 500
        total, over = 8000 // groups, 1.3
        tight = replica("tight", 20, used=total // 10, total=total, peak=over * total, own=20, groups=groups)
        crowded = replica("crowded", running=200, used=9_000, total=100_000)
        assert decide(policy, [tight, crowded], "low") == RoutingDecision("crowded", RoutingReason.KV_CLIFF)
        relaxed = with_group(tight, predicted_peak_blocks=total / 2)
        assert decide(policy, [relaxed, crowded], "low").replica_id == "tight"


def test_few_sequences_of_ones_own_do_not_speak_for_those_of_other_ingresses() -> None:
    tight = replica("tight", 60, used=6_000, total=10_000, peak=12_000)
    other = replica("other", 140, used=5_000, total=10_000, peak=7_000)
    assert decide(taught(), [tight, other], "high").replica_id == "other"
    policy = taught()
    send(policy, new("low"), "tight", -2.0).num_output_tokens = 140
    assert decide(policy, [replace(tight, num_own=1), other], "high").replica_id == "other"


def test_fast_steps_are_no_reason_to_wait_for_longer_than_they_save() -> None:
    policy = taught()
    pooled, *others = mixed(policy, busy=40)
    tight = with_group(pooled, predicted_peak_blocks=130_000.0)
    asked = [replace(new("low"), slo=LatencySlo(tpot_s=0.011))]
    decision = policy.choose(asked, [tight, *others], 0.0)
    assert decision is not None
    assert decision.replica_id in ("a", "b")
    assert decision.reason is RoutingReason.KV_CLIFF


def test_seats_that_lack_are_not_called_kv() -> None:
    policy = taught()
    seated = replica("seated", running=16, used=100, seats=16)
    decision = decide(policy, [seated, replica("crowded", running=200, used=9_000, total=100_000)], "low")
    assert decision == RoutingDecision("crowded", RoutingReason.LEAST_DELAY)


def test_a_request_with_many_sequences_needs_room_for_all_of_them() -> None:
    candidates = [replica("small", total=1000), replica("large", running=100, used=5000, total=100_000)]
    assert decide(TAUGHT, candidates, "high", 1).replica_id == "small"
    assert decide(TAUGHT, candidates, "high", 8).replica_id == "large"


def test_a_cached_prefix_is_followed_when_that_pays() -> None:
    policy = taught()
    prompt = prefix_hashes(list(range(40 * PREFIX_BLOCK)))
    earlier = new("low", 40 * PREFIX_BLOCK, prompt)
    finish(policy, send(policy, earlier, "a", 0.0), 150)
    follow_up = [new("low", 40 * PREFIX_BLOCK + 200, prompt)]
    candidates = [replica("a", running=3, used=100), replica("b", running=1, used=30)]
    assert policy.choose(follow_up, candidates, 1.0) == RoutingDecision("a", RoutingReason.CACHED_PREFIX)
    stranger = [new("low", 40 * PREFIX_BLOCK + 200, prefix_hashes(list(range(9, 40 * PREFIX_BLOCK))))]
    assert policy.choose(stranger, candidates, 1.0) == RoutingDecision("b", RoutingReason.LEAST_DELAY)
    busy = [replica("a", running=120, used=4000), candidates[1]]
    assert policy.choose(follow_up, busy, 1.0) == RoutingDecision("b", RoutingReason.LEAST_DELAY)
    forgetful = [replace(load, caches_prefixes=False) for load in candidates]
    assert policy.choose(follow_up, forgetful, 1.0) == RoutingDecision("b", RoutingReason.LEAST_DELAY)


def test_a_class_that_shows_is_told_apart_and_outputs_without_an_end_run_to_their_limit() -> None:
    policy = taught()
    policy.choose([new()], [replica("a"), replica("b")], 0.0)
    forecast = policy._lengths
    assert forecast.of_new(new("high")).mean == pytest.approx(3000, rel=0.15)  # the others count a little too
    assert forecast.of_new(new("low")).mean == pytest.approx(150, rel=0.2)
    assert 200 < forecast.of_new(new()).mean < 900  # of a class of its own: leans on all that ended
    endless = forecast.of_new(new(stops=()))
    assert (endless.mean, endless.power) == (4096, 4096 ** (2 - EASE))
    resumed = replace(new("high"), num_resumed_tokens=1000)
    assert forecast.of_new(resumed).mean == pytest.approx(2000, rel=0.15)


def test_what_is_open_is_forgotten_when_it_ends() -> None:
    policy = KvGrowth(MAX_MODEL_LEN)
    sequences = [send(policy, new(), "a", 0.0) for _ in range(5)]
    for sequence in sequences:
        finish(policy, sequence, 20)
        finish(policy, sequence, 20)
    assert policy._open == {}
