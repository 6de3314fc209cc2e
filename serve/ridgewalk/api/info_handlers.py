"""The endpoints that say something about the server."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ridgewalk.api.backend import BackendError, ServedModel
from ridgewalk.api.errors import ApiError
from ridgewalk.api.http import json_response
from ridgewalk.api.service import Service

SCRAPE_TIMEOUT_S = 4.0
"""What a scrape may take when the scraper does not say how long it waits."""

SCRAPE_MARGIN_S = 0.15
"""Of the time that a scraper waits, for the way back: an answer without one hung replica beats none."""

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class ModelCard(msgspec.Struct):
    """A model in ``/v1/models``; ``max_model_len`` as in vLLM."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class InfoHandlers:
    """Models, health, metrics, version."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        cards = [_card(model) for model in self._service.backend.models.values()]
        return json_response(msgspec.json.encode({"object": "list", "data": cards}))

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``; an id may contain slashes. Raises `ApiError`."""
        model = self._service.model(request, request.path_params["model_id"])
        return json_response(msgspec.json.encode(_card(model)))

    async def health(self, request: Request) -> Response:
        """``GET /health``: an empty 200, or a 503 that says what is missing."""
        if problem := self._service.backend.not_ready():
            raise ApiError(problem, status=503, code="not_ready")
        return Response(status_code=200)

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics`` of the whole service."""
        try:
            text = await self._service.backend.metrics(_scrape_timeout(request))
        except BackendError as error:
            raise ApiError.of_backend(error) from error
        return Response(text, headers={"content-type": PROMETHEUS_TEXT})

    async def version(self, request: Request) -> Response:
        """``GET /version``."""
        return json_response(msgspec.json.encode({"version": self._service.version}))

    async def root(self, request: Request) -> Response:
        """``GET /``: where to go from here."""
        paths = ["/v1/models", "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
        paths += ["/health", "/metrics", "/version"]
        body = {"name": "ridgewalk", "version": self._service.version, "endpoints": paths}
        return json_response(msgspec.json.encode(body))


def _scrape_timeout(request: Request) -> float:
    """Seconds that the service may take to answer; Prometheus says in a header when it gives up."""
    try:
        stated = float(request.headers.get("x-prometheus-scrape-timeout-seconds", ""))
    except ValueError:
        return SCRAPE_TIMEOUT_S
    return min(max(stated - SCRAPE_MARGIN_S, stated / 2), SCRAPE_TIMEOUT_S) if stated > 0 else SCRAPE_TIMEOUT_S


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(model.name, "model", model.created, "ridgewalk", model.max_model_len)
