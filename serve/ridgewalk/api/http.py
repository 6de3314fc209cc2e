"""Small things about HTTP that several files need."""

from __future__ import annotations

import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ridgewalk.api.errors import ApiError

_MAX_REQUEST_ID_BYTES = 128


def json_response(body: bytes) -> Response:
    """A 200 with JSON that is already encoded."""
    return Response(body, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's shape."""
    return Response(error.body(), status_code=error.status, headers=error.headers, media_type="application/json")


def new_request_id(request: Request, prefix: str) -> str:
    """The id of an answer. It does not depend on what the client sends, so two requests never share one."""
    return f"{prefix}{request.state.request_uid}"


class RequestIdMiddleware:
    """Every request gets an id of its own, and every response ``x-request-id``: the client's, or that one.

    ``adds_header``: False where the server adds the header, as Serve does.
    """

    def __init__(self, app: ASGIApp, adds_header: bool = True) -> None:
        self._app = app
        self._adds_header = adds_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        uid = uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "request_uid": uid}
        if not self._adds_header:
            await self._app(scope, receive, send)
            return
        shown = _client_request_id(scope) or uid

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": list(message.get("headers", []))}
                MutableHeaders(scope=message)["x-request-id"] = shown
            await send(message)

        await self._app(scope, receive, send_with_id)


def _client_request_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 0 < len(value) <= _MAX_REQUEST_ID_BYTES:
            return value.decode("ascii") if all(0x21 <= byte <= 0x7E for byte in value) else None
    return None
