"""Which replicas a deployment has, as this process's own Serve router knows them."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

PIN = "replica_id"
"""Keyword argument of a handle call that names the replica; without it the call goes where Serve likes."""

_routers: WeakValueDictionary[tuple[str, str], RequestRouter] = WeakValueDictionary()
# Module state, because Serve makes the routers itself, from a class it pickled by value, and hands nobody a reference.
# It is a module of its own because that pickle would otherwise carry a copy of the dictionary.


def register(app_name: str, deployment: str, router: RequestRouter) -> None:
    """Called by a router when Serve makes it."""
    _routers[app_name, deployment] = router


def running_replicas(handle: DeploymentHandle) -> Sequence[str]:
    """Unique ids of the running replicas behind a handle, sorted, as this process knows them now."""
    if not handle.is_initialized:
        handle._init()
    router = _routers.get((handle.deployment_id.app_name, handle.deployment_id.name))
    return [] if router is None else sorted(replica.unique_id for replica in list(router.curr_replicas))
