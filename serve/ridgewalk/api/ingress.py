"""The Ingress deployment: one ASGI app per replica, over the whole service."""

from __future__ import annotations

import asyncio
import logging

import msgspec
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from ridgewalk import __version__
from ridgewalk.api.app import build_app
from ridgewalk.api.served_model import load_served_model
from ridgewalk.logs import configure_logging
from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.replica.service_backend import ServiceBackend

logger = logging.getLogger(__name__)

INGRESS_NAME = "Ingress"
READY_TIMEOUT_S = 3600.0
"""The largest models load for long; Serve itself gives up on a replica that fails."""


class IngressModel(msgspec.Struct, frozen=True):
    """One model as the ingress must know it."""

    name: str
    path: str  # a folder that every node can read
    max_model_len: int


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
        names = [model.name for model in settings.models]
        self._metrics = IngressMetrics(str(serve.get_replica_context().rank.rank), names)
        models = [
            load_served_model(model.name, model.path, max_model_len=model.max_model_len) for model in settings.models
        ]
        self._backend = await ServiceBackend.connect(models, handles, self._metrics)
        await self._wait_ready()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_app(
            self._backend,
            api_keys=self._settings.api_keys,
            max_body_bytes=self._settings.max_body_bytes,
            version=__version__,
            observer=self._metrics,
        )

    def __del__(self) -> None:
        if hasattr(self, "_backend"):
            self._backend.close()

    async def _wait_ready(self) -> None:
        """Until then the port refuses, rather than answer every early request with an error."""
        for _ in range(int(READY_TIMEOUT_S / 0.05)):
            if self._backend.not_ready() is None:
                return
            await asyncio.sleep(0.05)
        raise RuntimeError(self._backend.not_ready())
