"""From a Serve application to replicas that run, with progress on the way and one sentence when they do not."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ridgewalk.config import ServeConfig

if TYPE_CHECKING:
    from ridgewalk.app import PlannedModel

STATUS_EVERY_S = 5.0
_ERROR_LINE = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)(?:\([\w.]+\))?: ", re.MULTILINE)
_ESCAPE_CODES = re.compile(r"\x1b\[[0-9;]*m")


class ServiceError(RuntimeError):
    """The service did not come up; the message is what the user should read."""


def start_serve(config: ServeConfig) -> None:
    """Start Serve unless it runs already; then it keeps the host and port that it has.

    Raises:
        ServiceError: its controller or a proxy did not start.
    """
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    # What it has to say of a failing replica, `deploy` says in a sentence.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(
            proxy_location=ProxyLocation.EveryNode,
            http_options=HTTPOptions(host=config.host, port=config.port),
            logging_config=LoggingConfig(log_level="CRITICAL", enable_access_log=False),
        )
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise ServiceError(f"Ray Serve did not start: {error_sentence(str(error))}") from None


def deploy(config: ServeConfig, models: list[PlannedModel], console: Console) -> None:
    """Run the application and wait until every deployment is healthy.

    Raises:
        ServiceError: a replica failed to start, or a proxy does not find the ingress.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from ridgewalk.app import build_application

    done = threading.Event()
    watcher = threading.Thread(target=_show_progress, args=(config.app_name, done, console), daemon=True)
    watcher.start()
    try:
        serve.run(build_application(config, models), name=config.app_name, route_prefix="/")
    except (RuntimeError, TimeoutError, RayServeException, ray.exceptions.RayError) as error:
        raise ServiceError(_deployment_problem(config.app_name) or error_sentence(str(error))) from None
    finally:
        done.set()
        watcher.join(1.0)  # it may be waiting for a controller that is gone


def end_replies(app_name: str, timeout_s: float) -> None:
    """Have every ingress end its open replies in order, rather than break them off when its process ends."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    # Nothing to be said to clients in time is no reason not to end.
    with suppress(RuntimeError, TimeoutError, RayServeException, ray.exceptions.RayError):
        serve.get_app_handle(app_name).broadcast("end_replies").results(timeout_s=timeout_s)


def error_sentence(text: str) -> str:
    """What the error itself says, of the traceback (within tracebacks) that Ray makes of it."""
    text = _ESCAPE_CODES.sub("", text).strip()
    starts = list(_ERROR_LINE.finditer(text))
    if starts:
        text = text[starts[-1].end() :]
    return " ".join(text.split())


def _show_progress(app_name: str, done: threading.Event, console: Console) -> None:
    """One line per change: which deployments still start."""
    from ray import serve

    shown = ""
    while not done.wait(STATUS_EVERY_S if shown else 1.0):
        try:
            app = serve.status().applications.get(app_name)
        except Exception:  # the controller is starting or ending: nothing to show
            continue
        if app is None or done.is_set():
            continue
        line = "; ".join(f"{name}: {_counts(status.replica_states)}" for name, status in app.deployments.items())
        if line != shown:
            console.print(f"[dim]{line}[/]", highlight=False)
            shown = line


def _counts(states: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} {state.lower()}" for state, count in states.items() if count) or "none yet"


def _deployment_problem(app_name: str) -> str | None:
    """The error of the first deployment that failed: its constructor's own."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        app = serve.status().applications.get(app_name)
    except (RayServeException, ray.exceptions.RayError):
        return None
    for status in app.deployments.values() if app else ():
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY") and status.message:
            return error_sentence(status.message)
    return None
