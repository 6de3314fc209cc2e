"""The pace that a client asks for: llm-d's request headers, over what the model's configuration says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ridgewalk.api.errors import ApiError
from ridgewalk.routing.latency_slo import LatencySlo

TTFT_HEADER, TPOT_HEADER = "x-slo-ttft-ms", "x-slo-tpot-ms"


def requested_slo(headers: Mapping[str, str], default: LatencySlo) -> LatencySlo:
    """What the headers ask for; ``default`` where they say nothing. Raises `ApiError`."""
    if TTFT_HEADER in headers:
        default = replace(default, ttft_s=_seconds(headers, TTFT_HEADER))
    if TPOT_HEADER in headers:
        default = replace(default, tpot_s=_seconds(headers, TPOT_HEADER))
    return default


def _seconds(headers: Mapping[str, str], name: str) -> float:
    text = headers[name]
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise ApiError(
            f"Header `{name}` is not valid: {text[:40]!r} is not a number of milliseconds over 0.",
            param=name,
            code="invalid_value",
        )
    return milliseconds / 1e3
