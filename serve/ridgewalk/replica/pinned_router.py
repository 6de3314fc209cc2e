"""Lets a caller say which replica of a deployment takes a call.

Serve builds one router per deployment handle, inside the caller's process, and feeds it the running replicas.
"""

from __future__ import annotations

from ray.serve._private.common import RequestMetadata
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, RunningReplica

from ridgewalk.replica import router_registry


class PinnedRouter(PowerOfTwoChoicesRequestRouter):
    """A call pinned to a replica goes there; if that replica is gone, to another one, which answers ``moved``.

    Serve's caller hangs if nothing is ever chosen or if this raises, hence never nothing and never an error.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        router_registry.register(self._deployment_id.app_name, self._deployment_id.name, self)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The pinned replica alone while it runs."""
        pin = pending_request.kwargs.get(router_registry.PIN) if pending_request is not None else None
        if pin is not None and pending_request is not None:
            pending_request.routing_context.should_backoff = True
            pinned = [replica for replica in candidate_replicas if replica.replica_id.unique_id == pin]
            if pinned:
                return [pinned]
        return await super().choose_replicas(candidate_replicas, pending_request)

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: RequestMetadata | None = None
    ) -> None:
        """Give the replica to the very request that it was chosen for.

        The power-of-two router gives it to whichever has waited longest, which would undo the pin. The metadata is
        compared by identity: calls made within one HTTP request may share an internal request id.
        """
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                self._record_queue_wait_time(pending)
                pending.future.set_result(replica)
                self._remove_pending_request_from_indices(pending)
                return
