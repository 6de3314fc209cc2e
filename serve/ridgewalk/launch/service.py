"""`ridgewalk serve`: from a configuration to a service that answers, and back to nothing."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import httpx
from rich.console import Console

from ridgewalk.config import ConfigError, ServeConfig
from ridgewalk.launch import local_ray

if TYPE_CHECKING:
    from ridgewalk.app import PlannedModel

READY_TIMEOUT_S = 1800.0
STATUS_EVERY_S = 5.0


class ServiceError(RuntimeError):
    """The service did not come up; the message is what the user should read."""


class Stopped(BaseException):
    """A signal asked us to end. Not an Exception, so that no handler swallows it."""


def run_service(config: ServeConfig, console: Console) -> None:
    """Serve until SIGINT or SIGTERM, then leave no process behind.

    Raises:
        ConfigError: before anything has started.
        ServiceError: the replicas failed to start.
    """
    with running_service(config, console):
        _announce(config, console)
        _wait_for_signal()
    console.print("stopped")


@contextmanager
def running_service(config: ServeConfig, console: Console) -> Iterator[None]:
    """The service, ready, for as long as the block runs."""
    _install_signal_handlers()
    joins = bool(os.environ.get("RAY_ADDRESS"))
    try:
        if joins:
            with _joined(config, console):
                yield
        else:
            with _local(config, console):
                yield
    except Stopped:
        return


@contextmanager
def _local(config: ServeConfig, console: Console) -> Iterator[None]:
    _check_port(config)
    started = time.monotonic()
    mark = local_ray.prepare_environment()
    from ridgewalk.app import needed_cpus, resolve

    models = resolve(config)
    _print_plan(models, console)
    _check_gpus(config)
    try:
        console.print("starting Ray on this machine")
        local_ray.start_ray(needed_cpus(config))
        _deploy(config, models, console)
        console.print(f"ready after {time.monotonic() - started:.1f} s")
        yield
    finally:
        _ignore_signals()
        console.print("stopping ...")
        local_ray.stop_ray(mark)


@contextmanager
def _joined(config: ServeConfig, console: Console) -> Iterator[None]:
    import ray
    from ray import serve

    from ridgewalk.app import resolve

    console.print(f"joining the Ray cluster at {os.environ['RAY_ADDRESS']}")
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    alive = [node for node in ray.nodes() if node["Alive"]]
    models = resolve(config, num_hosts=len(alive))
    _print_plan(models, console)
    _check_room(config)
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        console.print(
            "[yellow]note:[/] this cluster may run Serve without HAProxy (it is slower); "
            "start its nodes with RAY_SERVE_ENABLE_HA_PROXY=1 to have it"
        )
    try:
        _deploy(config, models, console)
        yield
    finally:
        _ignore_signals()
        console.print("removing the application from the cluster ...")
        serve.delete(config.app_name, _blocking=False)
        ray.shutdown()


def _deploy(config: ServeConfig, models: list[PlannedModel], console: Console) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from ridgewalk.app import build_application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        http_options=HTTPOptions(host=config.host, port=config.port),
        logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False),
    )
    done = threading.Event()
    watcher = threading.Thread(target=_show_progress, args=(config.app_name, done, console), daemon=True)
    watcher.start()
    try:
        serve.run(build_application(config, models), name=config.app_name, route_prefix="/")
    except RuntimeError as error:
        raise ServiceError(_deployment_problem(config.app_name) or str(error)) from None
    finally:
        done.set()
        watcher.join()
    _wait_healthy(config)


def _show_progress(app_name: str, done: threading.Event, console: Console) -> None:
    """One line per change: which deployments still start."""
    from ray import serve

    shown = ""
    while not done.wait(STATUS_EVERY_S if shown else 1.0):
        try:
            app = serve.status().applications.get(app_name)
        except Exception:  # the controller is starting or ending: nothing to show
            continue
        if app is None:
            continue
        line = "; ".join(f"{name}: {_counts(status.replica_states)}" for name, status in app.deployments.items())
        if line != shown:
            console.print(f"[dim]{line}[/]", highlight=False)
            shown = line


def _counts(states: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} {state.lower()}" for state, count in states.items() if count) or "none yet"


def _deployment_problem(app_name: str) -> str | None:
    """The last sentence of the first deployment that failed: the constructor's own error."""
    from ray import serve

    app = serve.status().applications.get(app_name)
    for name, status in (app.deployments if app else {}).items():
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY") and status.message:
            lines = [line.strip() for line in status.message.strip().splitlines() if line.strip()]
            return f"{name} did not start: {lines[-1]}"
    return None


def _wait_healthy(config: ServeConfig) -> None:
    """Until the public port answers: HAProxy learns of the ingress a moment after Serve does."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{base_url(config)}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise ServiceError(f"{base_url(config)}/health did not answer 200 within {READY_TIMEOUT_S:.0f} s")


def base_url(config: ServeConfig) -> str:
    """Where a client on this machine finds the service."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "", "::") else config.host
    return f"http://{host}:{config.port}"


def _announce(config: ServeConfig, console: Console) -> None:
    url, model = base_url(config), config.models[0].served_name
    auth = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_keys or config.api_key_file else ""
    console.print(f"\nserving at [bold]{url}/v1[/]  (metrics at {url}/metrics). Try:\n", highlight=False)
    messages = '[{"role": "user", "content": "What is 27 + 58?"}]'
    body = f'{{"model": "{model}", "stream": true, "messages": {messages}}}'
    command = f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{auth} \\\n    -d '{body}'"
    console.print(command, highlight=False, soft_wrap=True, markup=False)
    console.print("\nCtrl-C ends it.", highlight=False)


def _print_plan(models: list[PlannedModel], console: Console) -> None:
    for model in models:
        for placement in model.placements:
            plan, engine = placement.memory_plan, placement.engine
            cache = "KV sized by the device"
            if plan is not None:
                cache = f"{plan.weight_bytes / 2**20:.0f} MiB of weights per rank, KV for {plan.kv_tokens:,} tokens"
            ranks = placement.replicas * engine.world_size
            console.print(
                f"[bold]{model.name}[/]  {engine.placement} ({ranks} rank{'s' if ranks > 1 else ''}), {engine.dtype}, "
                f"{cache} per replica, context {model.max_model_len:,}",
                highlight=False,
            )


def _check_port(config: ServeConfig) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"port {config.port} on {config.host} cannot be used ({error.strerror}); choose another with --port"
            ) from None


def _check_gpus(config: ServeConfig) -> None:
    from ridgewalk.app import needed_gpus

    wanted = needed_gpus(config)
    if wanted > 0:
        from ray._private.accelerators import NvidiaGPUAcceleratorManager

        found = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
        if found < wanted:
            raise ConfigError(
                f"the service needs {wanted:g} GPUs but this machine has {found}; lower -tp or --replicas"
            )


def _check_room(config: ServeConfig) -> None:
    import ray

    from ridgewalk.app import needed_cpus, needed_gpus

    free = ray.available_resources()
    for resource, wanted in (("CPU", needed_cpus(config)), ("GPU", needed_gpus(config))):
        if free.get(resource, 0.0) < wanted:
            raise ConfigError(
                f"the service needs {wanted:g} {resource}s but the cluster has {free.get(resource, 0.0):g} free of "
                f"{ray.cluster_resources().get(resource, 0.0):g}; lower -tp, --replicas or cpus_per_rank, or add nodes"
            )


def _install_signal_handlers() -> None:
    def stop(signum: int, frame: object) -> NoReturn:
        raise Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _wait_for_signal() -> None:
    _install_signal_handlers()  # Ray replaces SIGTERM's when it connects
    while True:
        time.sleep(3600)
