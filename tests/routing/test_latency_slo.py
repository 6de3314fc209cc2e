"""What requests that ask for a pace change about where they, and others, go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ridgewalk.routing.decision import RoutingDecision, RoutingReason
from ridgewalk.routing.kv_growth import KvGrowth
from ridgewalk.routing.latency_slo import LatencySlo
from ridgewalk.routing.open_sequence import OpenSequence
from ridgewalk.routing.replica_load import ReplicaLoad
from tests.routing.builders import new, replica, send, taught

BRISK = LatencySlo(tpot_s=0.011)
"""TP4 keeps it while it has little to do (6 ms and 0.02 for each sequence, and its KV), TP1 (16 ms) never."""


def pool(policy: KvGrowth, writing: int, slo: LatencySlo, since: float = 0.0) -> ReplicaLoad:
    """TP4 with as many long ones under way, each with 500 tokens at 8 ms; ``since``: when they got their first."""
    for _ in range(writing):
        sequence = send(policy, new("high", slo=slo), "pooled", since - 0.1)
        sequence.on_tokens(1, since)
        sequence.on_tokens(500, since + 4.0)
    return replica("pooled", writing, used=writing * 38, total=100_000, placement="TP4", own=writing)


def decide(policy: KvGrowth, candidates: list[ReplicaLoad], slo: LatencySlo, now: float = 4.0) -> RoutingDecision:
    decision = policy.choose([new("low", slo=slo)], candidates, now)
    assert decision is not None
    return decision


def test_a_request_goes_where_its_pace_is_kept_though_others_delay_less() -> None:
    policy = taught()
    candidates = [pool(policy, 160, LatencySlo()), replica("free", total=14_000)]
    assert decide(policy, candidates, LatencySlo()) == RoutingDecision("free", RoutingReason.FEWER_RANKS)
    assert decide(policy, candidates, BRISK) == RoutingDecision("pooled", RoutingReason.LATENCY_SLO)


def test_without_room_a_pace_is_no_reason() -> None:
    policy = taught()
    full = replica("pooled", 100, used=99_999, total=100_000, placement="TP4", own=100)
    assert decide(policy, [full, replica("free", total=14_000)], BRISK).replica_id == "free"


def test_where_nobody_keeps_it_the_least_delay_decides() -> None:
    policy, hopeless = taught(), LatencySlo(tpot_s=0.001)
    candidates = [pool(policy, 100, LatencySlo()), replica("free", total=14_000)]
    assert decide(policy, candidates, hopeless) == decide(policy, candidates, LatencySlo())


def test_a_request_keeps_away_from_those_that_would_miss_their_pace_for_it() -> None:
    """The pool's 40 wrote 500 tokens at 8 ms; with some 2,500 to come at 7.1 ms they come to 7.3 on average."""
    busy = replica("busy", 250, used=9_000, total=20_000)
    for limit, expected in ((0.008, RoutingDecision("pooled", RoutingReason.POOLED_KV)), (0.0, "")):
        policy = taught()
        pooled = pool(policy, 40, LatencySlo(tpot_s=limit or limit_just_kept()))
        decision = decide(policy, [pooled, busy], LatencySlo())
        assert decision == (expected or RoutingDecision("busy", RoutingReason.LATENCY_SLO))


def limit_just_kept() -> float:
    """The mean time per token of the pool's 40, by what the policy knows of them, without another one."""
    policy = taught()
    pooled = pool(policy, 40, LatencySlo())
    decide(policy, [pooled, replica("a")], LatencySlo())  # learns what is there
    there = policy._open["pooled"]
    step_s = policy._paces["TP4"].step_s(40, 40 * 38)
    means = (there.further_s + there.remaining * step_s) / (there.further_tokens + there.remaining)
    return float(means.max()) + 1e-9


def test_those_that_are_late_anyway_hold_nobody_off() -> None:
    policy = taught()
    candidates = [pool(policy, 40, LatencySlo(tpot_s=0.001)), replica("busy", 250, used=9_000, total=100_000)]
    assert decide(policy, candidates, LatencySlo()).replica_id == "pooled"


def test_the_time_to_the_first_token_counts_until_it_has_come() -> None:
    """40,000 prompt tokens take 1.2 s on TP4 and 4 s on TP1."""
    policy, soon = taught(), LatencySlo(ttft_s=2.0)
    candidates = [
        replica("pooled", 250, used=9_000, total=100_000, placement="TP4"),
        replica("free", total=100_000),
    ]
    for _ in range(250):
        send(policy, new("high"), "pooled", -1.0).on_tokens(500, 0.0)

    def chosen(slo: LatencySlo, resumed: int = 0) -> str:
        request = replace(new("low", 40_000 - resumed, slo=slo), num_resumed_tokens=resumed)
        decision = policy.choose([request], candidates, 0.0)
        assert decision is not None
        return decision.replica_id

    assert chosen(LatencySlo()) == "free"
    assert chosen(soon) == "pooled"
    assert chosen(soon, resumed=10) == "free"


@pytest.mark.parametrize("resumed", [0, 7])
def test_time_runs_from_the_first_token_that_came_from_this_replica(resumed: int) -> None:
    sequence = OpenSequence(replace(new(), num_resumed_tokens=resumed), "a", 0.0, resumed)
    sequence.on_tokens(resumed, 0.5)
    assert sequence.first_token_at is None
    sequence.on_tokens(resumed + 1, 1.0)
    sequence.on_tokens(resumed + 3, 2.0)
    assert (sequence.first_token_at, sequence.num_written) == (1.0, 3)
