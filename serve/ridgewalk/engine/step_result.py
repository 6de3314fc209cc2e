"""What a step changed, and what the scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ridgewalk.engine.request import Request
from ridgewalk.engine.step import TokenLogprobs


class NewToken(msgspec.Struct, frozen=True):
    """One token that a step gave one request."""

    request: Request
    offset: int  # its position in the request's output
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class StepResult:
    """What one step changed: the tokens it sampled and the requests that ended by them."""

    step_id: int
    new_tokens: list[NewToken]
    ended: list[Request]


@dataclass
class SchedulerCounters:
    """Totals since the start; they only grow."""

    num_preemptions: int = 0
    recomputed_tokens: int = 0
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # of these, found
    prompt_tokens: int = 0
    generation_tokens: int = 0
    computed_tokens: int = 0  # recomputed ones included
    steps: int = 0
