"""The replicas of one model that an ingress can reach, and which of them takes the next request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import msgspec
import ray
import zmq
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ridgewalk.replica.protocol import Attach, ChannelAddress, Introduction
from ridgewalk.replica.replica_link import ReplicaLink
from ridgewalk.replica.router_registry import running_replicas
from ridgewalk.routing.least_loaded import RoutingReason, choose_replica

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
"""For the short calls; a replica that takes longer is tried again."""


class ReplicaPool:
    """Keeps a `ReplicaLink` to every running replica of every placement of one model."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        introduction: Introduction,
        handles: Mapping[str, DeploymentHandle],
        on_routed: Callable[[str, RoutingReason], None],
    ) -> None:
        self._context = context
        self._introduction = introduction
        self._attach = Attach(introduction.ingress_id, introduction.secret)
        self._handles = handles
        self._on_routed = on_routed
        self._links: dict[str, ReplicaLink] = {}
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """True while at least one replica can take requests."""
        return any(link.ready for link in self._links.values())

    def maintain(self) -> None:
        """Follow Serve's list of replicas: connect to new ones, drop gone ones. Called several times a second."""
        listed = {replica_id: placement for placement, replica_id in self.replicas()}
        for replica_id in [key for key, link in self._links.items() if key not in listed or link.silent]:
            self.drop(self._links[replica_id])
        for replica_id, placement in listed.items():
            if replica_id not in self._links and replica_id not in self._connecting:
                self._connecting[replica_id] = asyncio.create_task(self._connect(placement, replica_id))
        if self.ready:
            self._changed.set()

    def heartbeat(self) -> None:
        """Tell every replica that this ingress is there."""
        for link in self._links.values():
            link.heartbeat()

    def replicas(self) -> list[tuple[str, str]]:
        """Placement and id of every running replica, reachable or not."""
        return [
            (placement, replica_id)
            for placement, handle in self._handles.items()
            for replica_id in running_replicas(handle)
        ]

    def handle(self, placement: str) -> DeploymentHandle:
        """The handle of a placement's deployment."""
        return self._handles[placement]

    def choose(self, num_sequences: int) -> ReplicaLink | None:
        """The replica for a request of so many sequences, or None while there is none."""
        decision = choose_replica(link.routing_load() for link in self._links.values() if link.ready)
        if decision is None:
            return None
        link = self._links[decision.replica_id]
        self._on_routed(link.placement, decision.reason)
        link.num_sent += num_sequences
        return link

    def drop(self, link: ReplicaLink) -> None:
        """The replica does not answer as it should; it is connected to again if Serve still lists it."""
        link.close()
        if self._links.get(link.replica_id) is link:
            del self._links[link.replica_id]

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait until a replica can take requests; False after ``timeout_s``."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self.ready:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                return False
        return True

    def close(self) -> None:
        """Disconnect from every replica."""
        for task in self._connecting.values():
            task.cancel()
        for link in list(self._links.values()):
            self.drop(link)

    async def _connect(self, placement: str, replica_id: str) -> None:
        handle = self._handles[placement]
        try:
            answer = await asyncio.wait_for(
                _introduce(handle, msgspec.msgpack.encode(self._introduction), replica_id), CALL_TIMEOUT_S
            )
            if answer is not None:
                address = msgspec.msgpack.decode(answer, type=ChannelAddress)
                self._links[replica_id] = ReplicaLink(
                    self._context, handle, placement, replica_id, self._attach, address
                )
        except (asyncio.TimeoutError, ray.exceptions.RayError, RayServeException) as error:
            logger.warning("replica %s does not answer yet: %s", replica_id, type(error).__name__)
            await asyncio.sleep(0.5)
        finally:
            del self._connecting[replica_id]


async def _introduce(handle: DeploymentHandle, introduction: bytes, replica_id: str) -> bytes | None:
    return await handle.introduce.remote(introduction, replica_id=replica_id)
