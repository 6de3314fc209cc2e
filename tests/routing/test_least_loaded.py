"""Properties of the default routing policy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.routing.least_loaded import ReplicaLoad, RoutingReason, choose_replica

counts = st.integers(0, 20)
loads = st.lists(
    st.builds(
        ReplicaLoad,
        replica_id=st.uuids().map(str),
        num_running=counts,
        num_waiting=st.sampled_from([0, 0, 1, 5]),
        num_own=counts,
        num_seats=st.integers(1, 64),
        available_blocks=counts,
        total_blocks=st.just(20),
    ),
    max_size=6,
    unique_by=lambda load: load.replica_id,
)


def per_seat(load: ReplicaLoad) -> float:
    return max(load.num_running + load.num_waiting, load.num_own) / load.num_seats


@given(loads)
def test_one_of_the_replicas_is_chosen_and_none_is_better(candidates: list[ReplicaLoad]) -> None:
    decision = choose_replica(candidates)
    if not candidates:
        assert decision is None
        return
    assert decision is not None
    chosen = next(load for load in candidates if load.replica_id == decision.replica_id)
    idle = [load for load in candidates if load.num_waiting == 0]
    assert (chosen.num_waiting == 0) == bool(idle)
    assert per_seat(chosen) == min(per_seat(load) for load in (idle or candidates))
    if len(candidates) > 1:
        assert decision.reason is (RoutingReason.LEAST_LOADED if idle else RoutingReason.ALL_FULL)


def test_what_was_sent_since_the_last_report_counts() -> None:
    fresh = ReplicaLoad("a", 0, 0, 3, 8, 10, 10)
    other = ReplicaLoad("b", 2, 0, 0, 8, 10, 10)
    decision = choose_replica([fresh, other])
    assert decision is not None
    assert decision.replica_id == "b"


def test_equal_replicas_are_told_apart_by_available_kv() -> None:
    decision = choose_replica([ReplicaLoad("a", 1, 0, 0, 8, 3, 10), ReplicaLoad("b", 1, 0, 0, 8, 4, 10)])
    assert decision is not None
    assert decision.replica_id == "b"
