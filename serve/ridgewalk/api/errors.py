"""Errors that reach a client: a sentence, and OpenAI's shape around it."""

from __future__ import annotations

import math

import msgspec

from ridgewalk.api.backend import BackendError

CLIENT_CLOSED_REQUEST = 499
"""The status that is recorded, and never seen, when a client left before its answer."""

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_exceeded",
}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class ApiError(Exception):
    """A reply other than success. ``message`` is a sentence for the client, ``param`` the field at fault."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code or _CODES.get(status)
        self.headers = headers or {}

    @classmethod
    def of_backend(cls, error: BackendError) -> ApiError:
        """The reply for a request that the backend refused or lost; ``Retry-After`` is in whole seconds, rounded up."""
        headers = {}
        if error.retry_after_s is not None and math.isfinite(error.retry_after_s):
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        return cls(str(error), status=error.status, headers=headers)

    @property
    def type(self) -> str:
        """OpenAI's class of error, which follows from the status."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> bytes:
        """``{"error": {...}}`` as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


class ClientDisconnected(Exception):
    """The client closed its connection before its answer was complete."""


def not_supported(what: str, param: str) -> ApiError:
    """The reply to a feature that is not built."""
    return ApiError(f"{what} is not supported by this server.", param=param, code="unsupported_parameter")
