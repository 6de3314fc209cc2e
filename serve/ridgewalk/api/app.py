"""The ASGI application."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import ridgewalk
from ridgewalk.api.auth import ApiKeyMiddleware
from ridgewalk.api.backend import Backend
from ridgewalk.api.chat_handler import ChatHandler
from ridgewalk.api.completion_handler import CompletionHandler
from ridgewalk.api.errors import CLIENT_CLOSED_REQUEST, ApiError, ClientDisconnected
from ridgewalk.api.http import RequestIdMiddleware, error_response
from ridgewalk.api.info_handlers import InfoHandlers
from ridgewalk.api.observer import NullObserver, RequestObserver
from ridgewalk.api.open_replies import OpenReplies
from ridgewalk.api.service import Service
from ridgewalk.api.tokenize_handler import TokenizeHandler

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 2**20


def build_app(
    backend: Backend,
    *,
    api_keys: Collection[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    version: str = ridgewalk.__version__,
    adds_request_id: bool = True,
    open_replies: OpenReplies | None = None,
    observer: RequestObserver | None = None,
    clock: Callable[[], float] = time.perf_counter,
    wall_clock: Callable[[], float] = time.time,
) -> Starlette:
    """The OpenAI-compatible application in front of ``backend``.

    ``api_keys``: none means open to all. ``adds_request_id``: False where the server gives replies their
    ``x-request-id``. ``open_replies``: can end them. ``observer`` keeps metrics of requests, in seconds of ``clock``;
    ``wall_clock`` gives the ``created`` of answers. ``backend.models`` is read at each request: models may come and go.
    """
    if not all(key.strip() for key in api_keys):
        raise ValueError("An API key is empty.")
    service = Service(
        backend,
        max_body_bytes,
        version,
        observer or NullObserver(),
        clock,
        wall_clock,
        open_replies or OpenReplies(),
    )
    middleware = [Middleware(RequestIdMiddleware, adds_header=adds_request_id)]
    if api_keys:
        middleware.append(Middleware(ApiKeyMiddleware, keys=api_keys, observer=service.observer))
    app = Starlette(
        routes=_routes(service),
        middleware=middleware,
        exception_handlers=_ExceptionHandlers(service.observer).table(),
    )
    app.router.redirect_slashes = False
    return app


def _routes(service: Service) -> list[Route]:
    chat, completion = ChatHandler(service), CompletionHandler(service)
    tokenize, info = TokenizeHandler(service), InfoHandlers(service)
    return [
        Route("/v1/chat/completions", chat.handle, methods=["POST"]),
        Route("/v1/completions", completion.handle, methods=["POST"]),
        Route("/v1/models", info.models),
        Route("/v1/models/{model_id:path}", info.model),
        Route("/tokenize", tokenize.tokenize, methods=["POST"]),
        Route("/detokenize", tokenize.detokenize, methods=["POST"]),
        Route("/health", info.health),
        Route("/metrics", info.metrics),
        Route("/version", info.version),
        Route("/", info.root),
    ]


class _ExceptionHandlers:
    """Every exception becomes an error in OpenAI's shape, and is counted."""

    def __init__(self, observer: RequestObserver) -> None:
        self._observer = observer

    def table(self) -> dict[Any, Callable[..., Any]]:
        return {
            ApiError: self.api_error,
            HTTPException: self.http_exception,
            ClientDisconnected: self.client_disconnected,
            Exception: self.bug,
        }

    async def api_error(self, request: Request, error: ApiError) -> Response:
        self._observer.on_error(getattr(request.state, "served_model", ""), error.status)
        return error_response(error)

    async def http_exception(self, request: Request, error: HTTPException) -> Response:
        """What the router says: no such path, or not with this method."""
        path, method = request.url.path[:200], request.method[:20]
        sentences = {404: f"There is nothing at {path}.", 405: f"{path} does not take {method} requests."}
        message = sentences.get(error.status_code, f"{error.detail}.")
        return await self.api_error(
            request, ApiError(message, status=error.status_code, headers=dict(error.headers or {}))
        )

    async def client_disconnected(self, request: Request, error: ClientDisconnected) -> Response:
        gone = ApiError("The client closed its connection.", status=CLIENT_CLOSED_REQUEST)
        return await self.api_error(request, gone)  # nobody reads it

    async def bug(self, request: Request, error: Exception) -> Response:
        """Starlette raises the exception again after this answer, so that the server logs it."""
        return await self.api_error(request, ApiError("The server failed on this request.", status=500))
