"""The interactivity that a request asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LatencySlo:
    """Limits on an answer's pace, in seconds. A wish that routing heeds: nothing is refused or cut short for it."""

    ttft_s: float = math.inf  # to the first token
    tpot_s: float = math.inf  # from each token to the next, on average

    @classmethod
    def of_ms(cls, ttft_ms: float | None, tpot_ms: float | None) -> LatencySlo:
        """From milliseconds; None: no limit."""
        return cls(*(math.inf if limit is None else limit / 1e3 for limit in (ttft_ms, tpot_ms)))


NO_SLO = LatencySlo()
