"""What a pool tells its routing policy, and does with the answer. No Ray, no sockets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.replica.protocol import Introduction
from ridgewalk.replica.replica_pool import ReplicaPool
from ridgewalk.routing.decision import RoutingDecision, RoutingReason
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.replica_load import ReplicaLoad
from tests.routing.builders import new, replica


class Link:
    """A link whose replica has reported."""

    def __init__(self, placement: str, replica_id: str) -> None:
        self.placement, self.replica_id = placement, replica_id
        self.routable = True
        self.steps = [StepMeans(10, 0.01, 2, 20, 0)]

    def take_steps(self) -> list[StepMeans]:
        steps, self.steps = self.steps, []
        return steps

    def routing_load(self) -> ReplicaLoad:
        return replica(self.replica_id, placement=self.placement)


class Policy:
    """Takes the last; keeps what it was told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, StepMeans]] = []
        self.sent: list[OpenSequence] = []
        self.ended: list[tuple[OpenSequence, bool]] = []
        self.asked: list[tuple[Sequence[NewSequence], list[str]]] = []

    def choose(
        self, request: Sequence[NewSequence], loads: Sequence[ReplicaLoad], now: float
    ) -> RoutingDecision | None:
        self.asked.append((request, [load.replica_id for load in loads]))
        return RoutingDecision(loads[-1].replica_id, RoutingReason.POOLED_KV) if loads else None

    def on_steps(self, replica_id: str, placement: str, steps: StepMeans) -> None:
        self.steps.append((placement, steps))

    def on_sent(self, sequence: OpenSequence) -> None:
        self.sent.append(sequence)

    def on_ended(self, sequence: OpenSequence, stopped: bool) -> None:
        self.ended.append((sequence, stopped))


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def routed() -> list[tuple[str, RoutingReason]]:
    return []


@pytest.fixture
def pool(policy: Policy, routed: list[tuple[str, RoutingReason]]) -> ReplicaPool:
    introduction = Introduction("ingress", "secret", "127.0.0.1:9")
    pool = ReplicaPool(None, introduction, {}, policy, lambda *reason: routed.append(reason))  # type: ignore[arg-type]
    pool._links = {"a": Link("TP1", "a"), "b": Link("TP4", "b"), "leaving": Link("TP4", "leaving")}  # type: ignore[dict-item]
    pool._listed = {"a", "b"}
    return pool


async def test_the_policy_chooses_among_replicas_that_may_take_requests(
    pool: ReplicaPool, policy: Policy, routed: list[tuple[str, RoutingReason]]
) -> None:
    request = [new("high")]
    link = pool.choose(request)
    assert link is not None
    assert link.replica_id == "b"
    assert routed == [("TP4", RoutingReason.POOLED_KV)]
    assert [placement for placement, _ in policy.steps] == ["TP1", "TP4", "TP4"]
    link = pool.choose(request, {"b": 1.0})
    assert link is not None
    assert link.replica_id == "a"
    assert pool.choose(request, {"a", "b"}) is None
    assert [ids for _, ids in policy.asked] == [["a", "b"], ["a"], []]
    assert len(policy.steps) == 3  # each report is told once
    assert len(routed) == 2


async def test_the_policy_follows_a_sequence_from_its_sending_to_its_end(pool: ReplicaPool, policy: Policy) -> None:
    link = pool.choose([new("high")])
    assert link is not None
    sequence = pool.on_sent(new("high"), link)
    assert policy.sent == [sequence]
    assert (sequence.replica_id, sequence.num_output_tokens) == ("b", 0)
    pool.on_ended(sequence, True)
    assert policy.ended == [(sequence, True)]
