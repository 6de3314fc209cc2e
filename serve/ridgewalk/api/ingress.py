"""The Ingress deployment: one ASGI app per replica, over the whole service."""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from ridgewalk import __version__
from ridgewalk.api.app import build_app
from ridgewalk.api.open_replies import OpenReplies
from ridgewalk.api.served_model import load_served_model
from ridgewalk.logs import configure_logging
from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.replica.serve_rank import serve_rank
from ridgewalk.replica.service_backend import ServiceBackend
from ridgewalk.routing.decision import RoutingName
from ridgewalk.routing.latency_slo import LatencySlo

logger = logging.getLogger(__name__)

INGRESS_NAME = "Ingress"
READY_GRACE_S = 5.0
"""What a new ingress waits for the replicas of a running service before it takes requests. While models load longer,
it answers: `/health` with 503."""


class IngressModel(msgspec.Struct, frozen=True):
    """One model as the ingress must know it."""

    name: str
    path: str  # a folder that every node can read
    max_model_len: int
    num_replicas: dict[str, int]  # that shall run, by placement
    routing: RoutingName
    slo: LatencySlo


class IngressSettings(msgspec.Struct, frozen=True):
    """What every ingress replica is told."""

    models: list[IngressModel]
    api_keys: list[str]
    max_body_bytes: int


class Ingress:
    """Tokenizes, routes, detokenizes, writes SSE. Torch-free."""

    async def __init__(self, settings: IngressSettings, handles: dict[str, dict[str, DeploymentHandle]]) -> None:
        configure_logging()
        self._settings = settings
        self._replies = OpenReplies()
        names = [model.name for model in settings.models]
        self._metrics = IngressMetrics(serve_rank(), names, serve_rank)
        models = [
            load_served_model(model.name, model.path, max_model_len=model.max_model_len, slo=model.slo)
            for model in settings.models
        ]
        expected = {model.name: model.num_replicas for model in settings.models}
        routing = {model.name: model.routing for model in settings.models}
        self._backend = await ServiceBackend.connect(models, handles, expected, routing, self._metrics)
        await self._wait_ready()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_app(
            self._backend,
            api_keys=self._settings.api_keys,
            max_body_bytes=self._settings.max_body_bytes,
            version=__version__,
            adds_request_id=False,  # Serve does
            open_replies=self._replies,
            observer=self._metrics,
        )

    async def end_replies(self) -> None:
        """The service ends now: so do its streams, with an error event. Returns when all of it has been written."""
        self._replies.end_all()
        await self._replies.wait_ended()

    def __del__(self) -> None:
        if hasattr(self, "_backend"):
            self._backend.close()

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_GRACE_S
        while self._backend.not_ready() is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
