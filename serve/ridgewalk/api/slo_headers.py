"""The pace that a client asks for: llm-d's request headers, today's names and the former ones, over what the model's
configuration says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ridgewalk.api.errors import ApiError
from ridgewalk.routing.latency_slo import LatencySlo

TTFT_HEADERS, TPOT_HEADERS = (
    tuple(f"{prefix}slo-{name}-ms" for prefix in ("x-llm-d-", "x-")) for name in ("ttft", "tpot")
)


def requested_slo(headers: Mapping[str, str], default: LatencySlo) -> LatencySlo:
    """What the headers ask for; ``default`` where they say nothing. Raises `ApiError`."""
    return LatencySlo(_seconds(headers, TTFT_HEADERS, default.ttft_s), _seconds(headers, TPOT_HEADERS, default.tpot_s))


def _seconds(headers: Mapping[str, str], names: Sequence[str], default: float) -> float:
    """0 is what a gateway sends whose request is late already."""
    name = next((name for name in names if name in headers), None)
    if name is None:
        return default
    text = headers[name]
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 <= milliseconds < math.inf:
        raise ApiError(
            f"Header `{name}` is not valid: {text[:40]!r} is not a number of milliseconds, 0 or more.",
            param=name,
            code="invalid_value",
        )
    return milliseconds / 1e3
