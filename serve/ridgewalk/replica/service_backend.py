"""The ingress's view of the service: implements `api.backend.Backend` over Ray Serve handles and token channels."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence

import ray
import zmq
from ray.serve.handle import DeploymentHandle

from ridgewalk.api.backend import Sequence as SequenceRequest
from ridgewalk.api.backend import ServedModel, TokenStream
from ridgewalk.metrics.exposition import merge
from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.metrics.snapshot import decode
from ridgewalk.replica.peer_metrics import PeerServer, ask_peer
from ridgewalk.replica.protocol import Introduction
from ridgewalk.replica.replica_pool import ReplicaPool
from ridgewalk.replica.request_stream import RequestStream
from ridgewalk.routing.decision import RoutingName
from ridgewalk.routing.policy import make_policy

logger = logging.getLogger(__name__)

MAINTAIN_EVERY_S = 0.2
HEARTBEAT_EVERY = 5  # times MAINTAIN_EVERY_S
REPLICAS_SHARE = 0.75
"""Of the time for a scrape: the replicas tell which other ingresses there are, and these are asked in the rest."""

Handles = Mapping[str, Mapping[str, DeploymentHandle]]
"""Of every engine deployment, by model name and placement."""

ReplicaCounts = Mapping[str, Mapping[str, int]]
"""Replicas that shall run, by model name and placement."""


class ServiceBackend:
    """Lives on the ingress's event loop, where everything in it happens. Made by `connect`."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        handles: Handles,
        expected: ReplicaCounts,
        routing: Mapping[str, RoutingName],
        metrics: IngressMetrics,
        introduction: Introduction,
        peer_server: PeerServer,
    ) -> None:
        self._models = {model.name: model for model in models}
        self._expected = expected
        self._introduction = introduction
        self._peer_server = peer_server
        self._metrics = metrics
        self._peers: dict[str, Introduction] = {}  # other ingresses that a scrape has heard of
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pools = {
            name: ReplicaPool(
                context,
                introduction,
                handles[name],
                make_policy(routing[name], model.max_model_len),
                lambda placement, reason, name=name: metrics.on_routed(name, placement, reason.value),
            )
            for name, model in self._models.items()
        }
        self._maintenance = asyncio.create_task(self._maintain())

    @classmethod
    async def connect(
        cls,
        models: Sequence[ServedModel],
        handles: Handles,
        expected: ReplicaCounts,
        routing: Mapping[str, RoutingName],
        metrics: IngressMetrics,
    ) -> ServiceBackend:
        """Start following the replicas, and answering other ingresses."""
        secret = secrets.token_hex(16)
        peer_server = PeerServer(secret, metrics.snapshot)
        endpoint = await peer_server.start(ray.util.get_node_ip_address())
        introduction = Introduction(secrets.token_hex(8), secret, endpoint)
        return cls(models, handles, expected, routing, metrics, introduction, peer_server)

    @property
    def models(self) -> Mapping[str, ServedModel]:
        return self._models

    def generate(self, model: str, request_id: str, sequences: list[SequenceRequest]) -> TokenStream:
        return RequestStream(self._pools[model], self._introduction.ingress_id, request_id, sequences)

    def not_ready(self) -> str | None:
        missing = [name for name, pool in self._pools.items() if not pool.ready]
        if not missing:
            return None
        return f"No replica of {', '.join(missing)} is ready yet."

    async def metrics(self, timeout_s: float) -> bytes:
        first_s, then_s = REPLICAS_SHARE * timeout_s, (1 - REPLICAS_SHARE) * timeout_s
        asked = [
            (name, placement, asyncio.create_task(pool.ask_metrics(placement, replica_id, first_s)))
            for name, pool in self._pools.items()
            for placement, replica_id in pool.replicas()
        ]
        missing = Counter(
            {(name, placement): count for name, counts in self._expected.items() for placement, count in counts.items()}
        )
        self._metrics.on_scrape()
        snapshots = [decode(self._metrics.snapshot())]
        listed: dict[str, Introduction] = {}
        for name, placement, task in asked:
            answer = await task
            if answer is not None:
                missing[name, placement] -= 1
                snapshots.append(decode(answer.snapshot))
                listed.update({peer.ingress_id: peer for peer in answer.ingresses})
        listed.pop(self._introduction.ingress_id, None)
        answers, missing_ingresses = await self._ask_ingresses(listed, then_s)
        # While replicas are exchanged, old and new ones answer: none is missing then.
        return merge(
            snapshots + [decode(answer) for answer in answers],
            {key: max(0, count) for key, count in missing.items()},
            missing_ingresses,
        )

    def close(self) -> None:
        """Stop following replicas."""
        self._maintenance.cancel()
        self._peer_server.close()
        for pool in self._pools.values():
            pool.close()

    async def _ask_ingresses(self, listed: Mapping[str, Introduction], timeout_s: float) -> tuple[list[bytes], int]:
        """Snapshots of the other ingresses, and how many of those that replicas list did not answer.

        A replica that has just started lists those that have found it so far, and without replicas nobody lists any:
        those known before are asked too, and forgotten when they neither answer nor are listed.
        """
        peers = self._peers | listed
        answers = await asyncio.gather(*(ask_peer(peer, timeout_s) for peer in peers.values()))
        silent = {ingress_id for ingress_id, answer in zip(peers, answers, strict=True) if answer is None}
        self._peers = {key: peer for key, peer in peers.items() if key in listed or key not in silent}
        return [answer for answer in answers if answer is not None], len(silent & listed.keys())

    async def _maintain(self) -> None:
        turn = 0
        while True:
            for pool in self._pools.values():
                try:
                    pool.maintain()
                    if turn % HEARTBEAT_EVERY == 0:
                        pool.heartbeat()
                except Exception:
                    logger.exception("following the replicas failed; trying again")
            turn += 1
            await asyncio.sleep(MAINTAIN_EVERY_S)
