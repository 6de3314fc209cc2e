"""Properties of the policies that learn nothing."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.routing.decision import RoutingReason
from ridgewalk.routing.least_loaded import least_loaded
from ridgewalk.routing.replica_load import ReplicaLoad
from ridgewalk.routing.round_robin import RoundRobin
from tests.routing.builders import new, replica

counts = st.integers(0, 20)
loads = st.lists(
    st.builds(
        replica,
        replica_id=st.uuids().map(str),
        running=counts,
        waiting=st.sampled_from([0, 0, 1, 5]),
        own=counts,
        seats=st.integers(1, 64),
        used=counts,
        total=st.just(20),
    ),
    max_size=6,
    unique_by=lambda load: load.replica_id,
)


@given(loads)
def test_one_of_the_replicas_is_chosen_and_none_is_better(candidates: list[ReplicaLoad]) -> None:
    decision = least_loaded(candidates)
    if not candidates:
        assert decision is None
        return
    assert decision is not None
    chosen = next(load for load in candidates if load.replica_id == decision.replica_id)
    idle = [load for load in candidates if load.num_waiting == 0]
    assert (chosen.num_waiting == 0) == bool(idle)
    per_seat = [load.num_sequences / load.num_seats for load in (idle or candidates)]
    assert chosen.num_sequences / chosen.num_seats == min(per_seat)
    if len(candidates) > 1:
        assert decision.reason is (RoutingReason.LEAST_LOADED if idle else RoutingReason.ALL_FULL)


def test_what_was_sent_since_the_last_report_counts() -> None:
    decision = least_loaded([replica("a", own=3, seats=8), replica("b", running=2, seats=8)])
    assert decision is not None
    assert decision.replica_id == "b"


def test_equal_replicas_are_told_apart_by_available_kv() -> None:
    decision = least_loaded([replica("a", running=1, used=7, total=10), replica("b", running=1, used=6, total=10)])
    assert decision is not None
    assert decision.replica_id == "b"


def test_round_robin_gives_everybody_as_much_while_others_come_and_go() -> None:
    policy, everybody = RoundRobin(), [replica(name) for name in "dbca"]
    assert policy.choose([new()], [], 0.0) is None
    turns: Counter[str] = Counter()
    for number in range(40):
        present = everybody if number % 4 else everybody[:3]
        decision = policy.choose([new()], present, 0.0)
        assert decision is not None
        assert decision.replica_id in {load.replica_id for load in present}
        assert decision.reason is RoutingReason.NEXT
        turns[decision.replica_id] += 1
    assert max(turns.values()) - min(turns.values()) <= 3
