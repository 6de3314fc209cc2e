"""The ingress's view of the service: implements `api.backend.Backend` over Ray Serve handles and token channels."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence

import ray
import zmq
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ridgewalk.api.backend import Sequence as SequenceRequest
from ridgewalk.api.backend import ServedModel, TokenStream
from ridgewalk.metrics.exposition import merge
from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.replica.pinned_router import running_replicas
from ridgewalk.replica.replica_pool import ReplicaPool
from ridgewalk.replica.request_stream import RequestStream

logger = logging.getLogger(__name__)

MAINTAIN_EVERY_S = 0.2
HEARTBEAT_EVERY = 5  # times MAINTAIN_EVERY_S
METRICS_TIMEOUT_S = 2.0


class ServiceBackend:
    """Made on the ingress's event loop, where everything in it happens."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        handles: Mapping[str, Sequence[DeploymentHandle]],
        peers: DeploymentHandle,
        own_replica_id: str,
        metrics: IngressMetrics,
    ) -> None:
        self._models = {model.name: model for model in models}
        self._ingress_id = secrets.token_hex(8)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._metrics = metrics
        self._peers = peers
        self._own_replica_id = own_replica_id
        self._pools = {
            name: ReplicaPool(
                self._context,
                self._ingress_id,
                handles[name],
                lambda reason, name=name: metrics.on_routed(name, reason.value),
            )
            for name in self._models
        }
        self._maintenance = asyncio.create_task(self._maintain())

    @property
    def models(self) -> Mapping[str, ServedModel]:
        return self._models

    def generate(self, model: str, request_id: str, sequences: list[SequenceRequest]) -> TokenStream:
        # The client may name its request; two that choose the same name must not meet in a replica.
        unique_id = f"{request_id}.{secrets.token_hex(4)}"
        return RequestStream(self._pools[model], self._ingress_id, unique_id, sequences)

    def not_ready(self) -> str | None:
        missing = [name for name, pool in self._pools.items() if not pool.ready]
        if not missing:
            return None
        return f"No replica of {', '.join(missing)} is ready yet."

    async def metrics(self) -> bytes:
        replicas = [item for pool in self._pools.values() for item in pool.replicas()]
        ingresses = [
            (self._peers, replica_id)
            for replica_id in running_replicas(self._peers)
            if replica_id != self._own_replica_id
        ]
        answers = await asyncio.gather(*(_snapshot(handle, replica_id) for handle, replica_id in replicas + ingresses))
        snapshots = [answer for answer in answers if answer is not None]
        return merge([self._metrics.snapshot(), *snapshots], num_missing=len(answers) - len(snapshots))

    def close(self) -> None:
        """Stop following replicas."""
        self._maintenance.cancel()
        for pool in self._pools.values():
            pool.close()

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


async def _snapshot(handle: DeploymentHandle, replica_id: str) -> bytes | None:
    async def ask() -> bytes | None:
        return await handle.metrics.remote(replica_id=replica_id)

    try:
        return await asyncio.wait_for(ask(), METRICS_TIMEOUT_S)
    except (asyncio.TimeoutError, ray.exceptions.RayError, RayServeException):
        return None
