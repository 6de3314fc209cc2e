"""Lets a caller say which replica of a deployment takes a call, and see which replicas there are.

Serve builds one router per deployment handle, inside the caller's process, and feeds it the running replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RunningReplica

PIN = "replica_id"
"""Keyword argument of a handle call that names the replica; without it the call goes where Serve likes."""

_routers: WeakValueDictionary[tuple[str, str], PinnedRouter] = WeakValueDictionary()
# Module state, because Serve makes the routers itself and hands nobody a reference to them.


class PinnedRouter(PowerOfTwoChoicesRequestRouter):
    """A call pinned to a replica goes there; if that replica is gone, to another one, which answers ``moved``.

    Serve's caller hangs if nothing is ever chosen or if this raises, hence never nothing and never an error.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        _routers[(self._deployment_id.app_name, self._deployment_id.name)] = self

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The pinned replica alone while it runs."""
        pin = pending_request.kwargs.get(PIN) if pending_request is not None else None
        if pin is not None and pending_request is not None:
            pending_request.routing_context.should_backoff = True
            pinned = [replica for replica in candidate_replicas if replica.replica_id.unique_id == pin]
            if pinned:
                return [pinned]
        return await super().choose_replicas(candidate_replicas, pending_request)


def running_replicas(handle: DeploymentHandle) -> Sequence[str]:
    """Unique ids of the running replicas behind a handle, as this process knows them now."""
    if not handle.is_initialized:
        handle._init()
    router = _routers.get((handle.deployment_id.app_name, handle.deployment_id.name))
    return [] if router is None else sorted(replica.unique_id for replica in list(router.curr_replicas))
