"""The replicas of one model that an ingress can reach, and which of them takes the next request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
import ray
import zmq
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ridgewalk.replica.protocol import Attach, ChannelAddress, Introduction, ReplicaMetrics
from ridgewalk.replica.replica_link import ReplicaLink
from ridgewalk.replica.router_registry import running_replicas
from ridgewalk.routing.decision import RoutingReason
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.policy import RoutingPolicy

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
        policy: RoutingPolicy,
        on_routed: Callable[[str, RoutingReason], None],
    ) -> None:
        self._context = context
        self._introduction = introduction
        self._attach = Attach(introduction.ingress_id, introduction.secret)
        self._handles = handles
        self._policy = policy
        self._on_routed = on_routed
        self._links: dict[str, ReplicaLink] = {}
        self._listed: set[str] = set()  # running, as Serve says: others finish what they have, and get nothing new
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """True while at least one replica can take requests."""
        return bool(self._routable(()))

    def maintain(self) -> None:
        """Follow Serve's list of replicas: connect to new ones, let gone ones finish. Called several times a second."""
        listed = {replica_id: placement for placement, replica_id in self.replicas()}
        self._listed = set(listed)
        for replica_id, link in list(self._links.items()):
            if link.closed or link.silent or not (replica_id in listed or link.in_use):
                del self._links[replica_id]
                link.close()
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

    async def ask_metrics(self, placement: str, replica_id: str, timeout_s: float) -> ReplicaMetrics | None:
        """What a replica measured, or None when it does not answer in time."""
        link = self._links.get(replica_id)
        if link is not None and link.load is not None and not link.closed:
            asked = link.ask_metrics()
        else:
            asked = self._call_metrics(placement, replica_id)
        try:
            return await asyncio.wait_for(asked, timeout_s)
        except (asyncio.TimeoutError, ray.exceptions.RayError, RayServeException):
            return None

    async def _call_metrics(self, placement: str, replica_id: str) -> ReplicaMetrics | None:
        answer = await self._handles[placement].metrics.remote(replica_id=replica_id)
        return None if answer is None else msgspec.msgpack.decode(answer, type=ReplicaMetrics)

    def choose(self, request: Sequence[NewSequence], excluded: Collection[str] = ()) -> ReplicaLink | None:
        """The replica for a request's sequences, or None while there is none beside the ``excluded`` ids."""
        for each in self._links.values():
            for steps in each.take_steps():
                self._policy.on_steps(each.replica_id, each.placement, steps)
        loads = [link.routing_load() for link in self._routable(excluded)]
        decision = self._policy.choose(request, loads, asyncio.get_running_loop().time())
        if decision is None:
            return None
        link = self._links[decision.replica_id]
        self._on_routed(link.placement, decision.reason)
        return link

    def on_sent(self, new: NewSequence, link: ReplicaLink) -> OpenSequence:
        """A sequence goes to the replica that was chosen; its reader counts its tokens in what is returned."""
        now = asyncio.get_running_loop().time()
        sequence = OpenSequence(new, link.replica_id, now, new.num_resumed_tokens)
        self._policy.on_sent(sequence)
        return sequence

    def on_ended(self, sequence: OpenSequence, stopped: bool) -> None:
        """Nothing more comes of a sequence; ``stopped``: because it ended by itself."""
        self._policy.on_ended(sequence, stopped)

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
        for link in self._links.values():
            link.close()

    def _routable(self, excluded: Collection[str]) -> list[ReplicaLink]:
        return [
            link
            for replica_id, link in self._links.items()
            if link.routable and replica_id in self._listed and replica_id not in excluded
        ]

    async def _connect(self, placement: str, replica_id: str) -> None:
        handle = self._handles[placement]
        try:
            answer = await asyncio.wait_for(
                _introduce(handle, msgspec.msgpack.encode(self._introduction), replica_id), CALL_TIMEOUT_S
            )
            if answer is None:
                await asyncio.sleep(0.5)  # it failed, or is not the one that was meant: Serve will tell
            else:
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
