"""A pinned call reaches its replica, whatever else is being routed at the same time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import ray
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest

from ridgewalk.replica.pinned_router import PinnedRouter


@dataclass(eq=False)
class FakeReplica:
    """What the router asks of a replica; one of them answers slowly."""

    name: str
    delay_s: float
    max_ongoing_requests: int = 1000
    multiplexed_model_ids: set[str] = field(default_factory=set)
    node_id: str = "node"
    availability_zone: str | None = None

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.name, DeploymentID("engine", "app"))

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(self.delay_s)
        return 0


def pending(number: int, pin: str | None) -> PendingRequest:
    metadata = RequestMetadata(request_id="one HTTP request", internal_request_id="shared", call_method="generate")
    kwargs = {} if pin is None else {"replica_id": pin}
    return PendingRequest(args=[number], kwargs=kwargs, metadata=metadata)


@pytest.fixture
async def router(monkeypatch: pytest.MonkeyPatch) -> PinnedRouter:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    made = PinnedRouter(
        deployment_id=DeploymentID("engine", "app"),
        handle_source=DeploymentHandleSource.REPLICA,
        self_node_id="node",
        self_availability_zone=None,
        prefer_local_node_routing=False,
        prefer_local_az_routing=False,
        use_replica_queue_len_cache=False,
    )
    made.update_replicas([FakeReplica("a", 0.05), FakeReplica("b", 0.0)])  # type: ignore[list-item]
    return made


async def test_concurrent_pins_are_kept(router: PinnedRouter) -> None:
    wanted = ["a", "b"] * 10
    chosen = await asyncio.gather(
        *(router._choose_replica_for_request(pending(number, pin)) for number, pin in enumerate(wanted))
    )
    assert [replica.replica_id.unique_id for replica in chosen] == wanted


async def test_a_pin_on_a_replica_that_is_gone_gets_another_one(router: PinnedRouter) -> None:
    chosen = await asyncio.wait_for(router._choose_replica_for_request(pending(0, "gone")), 10)
    assert chosen.replica_id.unique_id in ("a", "b")


async def test_a_call_without_a_pin_goes_somewhere(router: PinnedRouter) -> None:
    chosen = await asyncio.wait_for(router._choose_replica_for_request(pending(0, None)), 10)
    assert chosen.replica_id.unique_id in ("a", "b")
