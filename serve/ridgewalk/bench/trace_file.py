"""A trace: one JSON object a line, as Mooncake publishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from ridgewalk.bench.workload import RequestShape
from ridgewalk.config import ConfigError

_Tokens = Annotated[int, msgspec.Meta(ge=1)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct):
    """Other fields (``hash_ids`` ...) are left unread."""

    input_length: _Tokens
    output_length: _Tokens
    timestamp: _Milliseconds | None = None


_decoder = msgspec.json.Decoder(_Line)


def read_trace(path: Path, limit: int | None = None) -> tuple[RequestShape, ...]:
    """The first ``limit`` requests of a trace, all without one; blank lines do not count.

    Raises:
        ConfigError: no such file, nothing in it, or a line that is not a request; names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    requests: list[RequestShape] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if limit is not None and len(requests) == limit:
            break
        request = _request(path, number, line)
        if requests and (request.timestamp_ms is None) != (requests[0].timestamp_ms is None):
            raise ConfigError(f"--trace: {path} line {number}: give every line a timestamp, or none")
        requests.append(request)
    if not requests:
        raise ConfigError(
            f"--trace: {path} has no requests; a line looks like {{'input_length': 90, 'output_length': 9}}"
        )
    return tuple(requests)


def _request(path: Path, number: int, line: str) -> RequestShape:
    try:
        entry = _decoder.decode(line.encode())
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise ConfigError(
            f"--trace: {path} line {number}: {error}; a line is a JSON object with input_length, output_length "
            "and, if the trace says when, timestamp in milliseconds"
        ) from None
    return RequestShape(entry.input_length, entry.output_length, entry.timestamp)
