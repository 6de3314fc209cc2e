"""Request bodies: read within a limit, decoded into structs, refused with the name of the field at fault."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
from starlette.requests import Request

from ridgewalk.api.errors import ApiError, ClientDisconnected

T = TypeVar("T")

_AT_PATH = re.compile(r"^(?P<problem>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<field>[^`]*)`")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises `ApiError` 413 as soon as it is known to be too large, `ClientDisconnected`."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """JSON to a struct. Raises `ApiError` 400 that names the field."""
    try:
        str(body, "utf-8")  # msgspec does not look inside the strings that it skips
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from error
    except UnicodeDecodeError as error:
        raise ApiError("The request's body is not valid UTF-8.") from error
    except msgspec.DecodeError as error:
        raise ApiError(f"The request's body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise ApiError("The request's body is nested too deeply.") from error


def _invalid_field(problem: str) -> ApiError:
    path = ""
    if match := _AT_PATH.match(problem):
        problem, path = match["problem"], match["path"].replace("[...]", "")
    if missing := _MISSING.search(problem):
        path = f"{path}.{missing['field']}" if path else missing["field"]
        return ApiError(f"Field `{path}` is required.", param=path, code="missing_required_parameter")
    problem = problem[:1].lower() + problem[1:]
    if not path:
        return ApiError(f"The request's body is not valid: {problem}.")
    return ApiError(f"Field `{path}` is not valid: {problem}.", param=path, code="invalid_value")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(f"The request's body is over the limit of {max_bytes} bytes.", status=413, code="body_too_large")
