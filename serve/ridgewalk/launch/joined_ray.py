"""A Ray cluster of somebody else's, which may run Serve and other applications already."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ridgewalk.config import ConfigError, ServeConfig
from ridgewalk.launch.deployment import ServiceError, error_sentence
from ridgewalk.launch.local_ray import plain_log_prefix

CONNECT_TIMEOUT_S = 5.0
REMOVAL_TIMEOUT_S = 30.0
"""How long a service waits for one that leaves."""

DELETE_TIMEOUT_S = 5.0
HOSTS = ("0.0.0.0", "127.0.0.1", "localhost")
"""Where Serve can be told to listen. With any other host its HAProxy does not reach the ingress on its own node: it
dials the loopback address, and the ingress listens on the host alone."""


@dataclass(frozen=True)
class RunningServe:
    """What a Serve that runs already says of itself."""

    http_host: str
    http_port: int
    routes: dict[str, str | None]  # by application
    deployed_at: dict[str, float]  # by application, as Serve's clock told it
    proxies: dict[str, str]  # address by node id; those that take requests


@contextmanager
def connected() -> Iterator[None]:
    """Connected to the cluster in RAY_ADDRESS.

    Raises:
        ServiceError: it does not answer.
    """
    address = os.environ["RAY_ADDRESS"]
    _check_answers(address)
    _prepare_environment(address)
    import ray

    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "" if "RAY_AUTH_MODE" in os.environ else "; if the cluster asks for a token, set RAY_AUTH_MODE=token"
        raise ServiceError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {error_sentence(str(error))}{hint}"
        ) from None
    # Replicas belong to whatever job started Serve, perhaps long ago: without this their log lines are not shown.
    ray._private.worker.global_worker._filter_logs_by_job = False
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would try for minutes.

    Raises:
        ServiceError: says so.
    """
    if address.startswith("ray://"):
        raise ServiceError(
            f"RAY_ADDRESS={address} is one of Ray Client, which cannot stream; run this on a node of the cluster, with "
            "RAY_ADDRESS=HOST:6379 or auto"
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return  # auto, or another word of Ray's: it knows at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ServiceError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error.strerror or error}") from None


def _prepare_environment(address: str) -> None:
    """What Ray reads when it connects; to be set before it is imported."""
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")  # seconds: something listens there, so it may answer
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # each failed attempt is a line otherwise
    plain_log_prefix()
    # `ray start` protects a cluster with this user's token if there is one; `ray.init` sends it unasked to "auto" only.
    has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    has_token = has_token or (Path.home() / ".ray" / "auth_token").exists()
    if has_token and _is_this_machine(address.rpartition(":")[0]):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _is_this_machine(host: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host.strip("[]"), 0))
    except OSError:
        return False
    return True


def is_address_of_a_cluster(address: str | None) -> bool:
    """Whether RAY_ADDRESS asks to join; ``local`` asks for a Ray of our own."""
    return address not in (None, "", "local")


def running_serve() -> RunningServe | None:
    """The cluster's Serve, or None if it runs none."""
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        client = _get_global_client()
    except RayServeException:
        return None
    if client is None:
        return None
    details: dict[str, Any] = client.get_serve_details()
    applications = details["applications"]
    return RunningServe(
        client.http_config.host or "",
        client.http_config.port,
        {name: app["route_prefix"] for name, app in applications.items()},
        {name: app["last_deployed_time_s"] for name, app in applications.items()},
        {
            node: proxy["node_ip"]
            for node, proxy in details["proxies"].items()
            if getattr(proxy["status"], "value", proxy["status"]) == "HEALTHY"
        },
    )


def await_removals() -> None:
    """Until the applications that are being removed are gone, `REMOVAL_TIMEOUT_S` at most: they hold their routes."""
    from ray import serve

    deadline = time.monotonic() + REMOVAL_TIMEOUT_S
    while time.monotonic() < deadline and any(
        application.status == "DELETING" for application in serve.status().applications.values()
    ):
        time.sleep(0.2)


def adopt(config: ServeConfig, found: RunningServe | None, console: Console) -> ServeConfig:
    """``config`` with the host and port of the Serve that runs already: Serve cannot listen on a second port.

    Raises:
        ConfigError: an application is there already where this one would go, or Serve cannot listen on the host.
    """
    if found is None:
        if config.host not in HOSTS:
            raise ConfigError(
                f"host: Serve listens on every node of a cluster, so {config.host} cannot be asked for; choose one of "
                f"{', '.join(HOSTS)}"
            )
        return config
    for name, route in found.routes.items():
        if route == "/":
            raise ConfigError(
                f"application {name!r} serves / on this cluster already, and no two applications can; remove it "
                f"({_removal(name)}), or join another cluster"
            )
    if config.app_name in found.routes:
        raise ConfigError(
            f"an application called {config.app_name!r} runs on this cluster already; choose another name with "
            f"--app-name, or remove it ({_removal(config.app_name)})"
        )
    if not found.http_host:
        raise ConfigError("Serve on this cluster has no HTTP proxies; start it with some (`serve shutdown` first)")
    if (found.http_host, found.http_port) != (config.host, config.port):
        console.print(
            f"[yellow]note:[/] Serve runs on this cluster already and listens on {found.http_host}:{found.http_port}: "
            f"--host {config.host} --port {config.port} are not used",
            highlight=False,
        )
    return config.model_copy(update={"host": found.http_host, "port": found.http_port})


def _removal(name: str) -> str:
    """How a user removes an application: Serve's command line can only remove all of them."""
    return f'`python -c "from ray import serve; serve.delete({name!r})"`; `serve shutdown` removes all'


def proxy_host(http_host: str, own_node: str, proxies: dict[str, str]) -> str:
    """Where the service answers: this node's proxy if it has one, else another node's, by its address."""
    try:
        anywhere = ipaddress.ip_address(http_host).is_unspecified
    except ValueError:  # a name
        anywhere = False
    if not anywhere or own_node in proxies or not proxies:
        return http_host
    return next(iter(proxies.values()))


def check_room(cpus: float, gpus: float) -> None:
    """Refuse what the cluster has no room for now.

    Raises:
        ConfigError: names what is missing.
    """
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    for resource, wanted in (("CPU", cpus), ("GPU", gpus)):
        if free.get(resource, 0.0) < wanted:
            raise ConfigError(
                f"the service needs {wanted:g} {resource}s but the cluster has {free.get(resource, 0.0):g} free of "
                f"{total.get(resource, 0.0):g}; lower -tp, --replicas or cpus_per_rank, or add nodes"
            )


def delete_application(name: str, deployed_at: float | None, again: threading.Event, console: Console) -> None:
    """Remove what was deployed under ``name``, unless somebody has deployed it anew since ``deployed_at``.

    Waits `DELETE_TIMEOUT_S` at most, less when ``again`` is set. Serve ends the running requests first.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        found = running_serve()
        if found is None or name not in found.routes:
            return
        if deployed_at is not None and found.deployed_at[name] != deployed_at:
            console.print(f"application {name!r} was deployed anew by somebody else: it stays", highlight=False)
            return
        console.print("removing the application from the cluster ...")
        serve.delete(name, _blocking=False)
        deadline = time.monotonic() + DELETE_TIMEOUT_S
        while name in serve.status().applications:
            if time.monotonic() > deadline or again.wait(0.1):
                console.print("it goes as soon as its running requests have ended", highlight=False)
                return
    except (RayServeException, ray.exceptions.RayError) as error:
        console.print(f"the cluster did not answer: {error_sentence(str(error))}", highlight=False, markup=False)
