"""`ridgewalk serve`: from a configuration to a service that answers, and back to nothing."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import httpx
from rich.console import Console

from ridgewalk.config import ConfigError, ServeConfig
from ridgewalk.launch import joined_ray, local_ray
from ridgewalk.launch.deployment import ServiceError, deploy, end_replies, start_serve
from ridgewalk.launch.haproxy import SERVE_HOST
from ridgewalk.launch.prometheus import find_prometheus, running_prometheus
from ridgewalk.launch.stopping import Stopped, StopSignals, wait_for_stop
from ridgewalk.load.scrape import Scrape
from ridgewalk.replica.engine_config import describe_expert_balance, describe_mesh

if TYPE_CHECKING:
    from ridgewalk.app import PlannedModel

READY_TIMEOUT_S = 1800.0
DRAIN_TIMEOUT_S = 3.0
"""What running requests get to end in when a service on this machine is stopped."""

END_TIMEOUT_S = 1.0
"""What the others then get to hear that they must end, and again for their clients to be told."""


def run_service(config: ServeConfig, console: Console, with_prometheus: bool = False) -> None:
    """Serve until SIGINT or SIGTERM, then leave no process behind.

    Raises:
        ConfigError: nothing of the service has started (though a Ray cluster may have been joined, and left again).
            Also if a Prometheus is wanted and none installed.
        ServiceError: the cluster cannot be joined, or the replicas failed to start.
    """
    try:
        program = find_prometheus() if with_prometheus else None
        with running_service(config, console) as url, ExitStack() as beside:
            prometheus = beside.enter_context(running_prometheus(program, url, console)) if program else None
            _announce(url, config, console)
            if prometheus:
                console.print(f"Prometheus, until then, at {prometheus}", highlight=False)
            wait_for_stop()
    except Stopped:
        console.print("stopped")


@contextmanager
def running_service(config: ServeConfig, console: Console) -> Iterator[str]:
    """The service, ready, for as long as the block runs; gives its URL.

    SIGINT or SIGTERM raises `Stopped` in the block, or here before it is entered: then the service ends as with any
    other error, and a second signal makes that quick. To be used in the main thread.

    Raises:
        ConfigError, ServiceError: as `run_service`.
        Stopped: by a signal.
    """
    with StopSignals() as signals:
        joins = joined_ray.is_address_of_a_cluster(os.environ.get("RAY_ADDRESS"))
        with (_joined if joins else _local)(config, console, signals) as url:
            yield url


@contextmanager
def _local(config: ServeConfig, console: Console, signals: StopSignals) -> Iterator[str]:
    address = listen_address(config)
    started = time.monotonic()
    surroundings = local_ray.prepare_environment()
    from ridgewalk.app import needed_cpus, resolve, with_placements

    config = with_placements(config, True, partial(console.print, highlight=False, markup=False))
    models = resolve(config)
    _print_plan(models, console)
    _check_gpus(config)
    url = base_url(config)
    ready = False
    try:
        console.print("starting Ray on this machine")
        local_ray.start_ray(surroundings, needed_cpus(config), address)
        signals.install()
        start_serve(config.model_copy(update={"host": SERVE_HOST}))
        deploy(config, models, console)
        _wait_healthy(lambda: url)
        console.print(f"ready after {time.monotonic() - started:.1f} s")
        ready = True
        yield url
    except (SystemExit, KeyboardInterrupt) as error:
        if ready or (isinstance(error, SystemExit) and error.code != signal.SIGTERM):
            raise
        raise Stopped from None  # what Ray makes of a signal while it starts
    finally:
        signals.begin_stop()
        console.print("stopping ...")
        if ready and not drain(url, signals.again):
            end_replies(config.app_name, END_TIMEOUT_S)
            drain(url, signals.again, END_TIMEOUT_S)
        local_ray.stop_ray(surroundings, signals.again)


@contextmanager
def _joined(config: ServeConfig, console: Console, signals: StopSignals) -> Iterator[str]:
    started = time.monotonic()
    console.print(f"joining the Ray cluster at {os.environ['RAY_ADDRESS']}", highlight=False)
    with joined_ray.connected():
        import ray

        from ridgewalk.app import needed_cpus, needed_gpus, num_cluster_hosts, resolve, with_placements

        signals.install()
        config = with_placements(config, False, partial(console.print, highlight=False, markup=False))
        models = resolve(config, num_cluster_hosts())
        _print_plan(models, console)
        joined_ray.await_removals()
        config = joined_ray.adopt(config, joined_ray.running_serve(), console)
        joined_ray.check_room(needed_cpus(config), needed_gpus(config))
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
            console.print(
                "[yellow]note:[/] this cluster may run Serve without HAProxy (it is slower); "
                "start its nodes with RAY_SERVE_ENABLE_HA_PROXY=1 to have it"
            )
        own_node = ray.get_runtime_context().get_node_id()

        def url() -> str:
            found = joined_ray.running_serve()
            host = joined_ray.proxy_host(config.host, own_node, found.proxies if found else {})
            return base_url(config.model_copy(update={"host": host}))

        start_serve(config)
        deployed_at = None
        try:
            deploy(config, models, console)
            found = joined_ray.running_serve()
            deployed_at = found.deployed_at.get(config.app_name) if found else None
            address = _wait_healthy(url)
            console.print(f"ready after {time.monotonic() - started:.1f} s")
            yield address
        finally:
            signals.begin_stop()
            joined_ray.delete_application(config.app_name, deployed_at, signals.again, console)


def drain(url: str, again: threading.Event, timeout_s: float = DRAIN_TIMEOUT_S) -> bool:
    """Wait until no request runs, ``timeout_s`` at most, less when ``again`` is set. False if some still do."""
    deadline = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False) as client:
        while (left := deadline - time.monotonic()) > 0 and not again.wait(0.05):
            try:
                scrape = Scrape.parse(client.get(f"{url}/metrics", timeout=left).text)
            except httpx.ConnectError:
                return True  # there is nothing left to wait for
            except httpx.HTTPError:
                continue  # busy: above all when the time is nearly over, requests may run on
            if not scrape.total("ridgewalk_num_requests_running") + scrape.total("ridgewalk_num_requests_waiting"):
                return True
    return again.is_set()


def _wait_healthy(url: Callable[[], str]) -> str:
    """Until the public port answers: the proxies learn of the ingress a moment after Serve does. Gives the URL."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            try:
                if client.get(f"{url()}/health").status_code == 200:
                    return url()
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
    raise ServiceError(f"{url()}/health did not answer 200 within {READY_TIMEOUT_S:.0f} s")


def base_url(config: ServeConfig) -> str:
    """Where a client on this machine finds the service."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _announce(url: str, config: ServeConfig, console: Console) -> None:
    model = config.models[0].served_name
    auth = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_keys or config.api_key_file else ""
    console.print(f"\nserving at {url}/v1  (metrics at {url}/metrics). Try:\n", highlight=False, markup=False)
    messages = '[{"role": "user", "content": "What is 27 + 58?"}]'
    body = f'{{"model": "{model}", "stream": true, "messages": {messages}}}'
    command = f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{auth} \\\n    -d '{body}'"
    console.print(command, highlight=False, soft_wrap=True, markup=False)
    console.print("\nCtrl-C ends it.", highlight=False)


def _print_plan(models: list[PlannedModel], console: Console) -> None:
    for model in models:
        for placement in model.placements:
            plan, engine = placement.memory_plan, placement.engine
            cache = "KV sized by the ranks"
            if plan is not None:
                cache = f"{plan.weight_bytes / 2**20:.0f} MiB of weights per rank, KV for {plan.describe_room()}"
            copies = f"{placement.replicas} replicas of " if placement.replicas > 1 else ""
            per = "attention group" if engine.dp > 1 else "replica"
            console.print(
                f"[bold]{model.name}[/]  {engine.placement} ({copies}{describe_mesh(engine)}), {engine.dtype}, "
                f"{cache} per {per}, context {model.max_model_len:,}{describe_expert_balance(engine)}",
                highlight=False,
            )


def listen_address(config: ServeConfig) -> str:
    """The numeric address that ``host`` means. Refuses a host or port that cannot be listened on.

    Raises:
        ConfigError: says why.
    """
    try:
        found = socket.getaddrinfo(
            config.host or "0.0.0.0", config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"port {config.port} on {config.host} cannot be used ({error.strerror}); choose another with --port, or "
            "another --host"
        ) from None
    if len(address) == 4 and address[3]:
        raise ConfigError(
            f"--host {config.host} is an address of one link only, which HAProxy cannot listen on; choose another "
            "address of this machine, 0.0.0.0 or ::"
        )
    return str(address[0])


def _check_gpus(config: ServeConfig) -> None:
    from ridgewalk.app import needed_gpus

    wanted = needed_gpus(config)
    if wanted > 0:
        from ray._private.accelerators import NvidiaGPUAcceleratorManager

        found = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
        if found < wanted:
            raise ConfigError(
                f"the service needs {wanted:g} GPUs but this machine has {found}; lower -tp, -pp, -dp or --replicas"
            )
