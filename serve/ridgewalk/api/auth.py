"""API keys."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from ridgewalk.api.errors import ApiError
from ridgewalk.api.http import error_response
from ridgewalk.api.observer import RequestObserver

OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/version"})
"""Paths that probes and scrapers read without a key."""


class ApiKeyMiddleware:
    """Lets a request through if it carries one of the keys: ``Authorization: Bearer <key>``."""

    def __init__(self, app: ASGIApp, keys: Collection[str], observer: RequestObserver) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(_bearer_token(scope)):
            await self._app(scope, receive, send)
            return
        self._observer.on_error("", 401)
        error = ApiError(
            "A valid API key is required: send it as `Authorization: Bearer <key>`.",
            status=401,
            headers={"www-authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _is_known(self, token: bytes) -> bool:
        # All keys are compared, each in constant time: how long it takes tells nothing about them.
        return sum([hmac.compare_digest(token, key) for key in self._keys]) > 0


def _bearer_token(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            return token.strip() if scheme.lower() == b"bearer" else b""
    return b""
