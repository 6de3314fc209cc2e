"""One sequence on its way through the engine. Mutable state that only the `Scheduler` changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ridgewalk.engine.length_class import LengthClass
from ridgewalk.engine.sampling import SamplingParams


class RequestStatus(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class FinishReason(str, Enum):
    """Why a request ended; every request ends exactly once."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(eq=False)
class Request:
    """One sequence. ``token_ids`` is the prompt followed by the output; ``num_computed_tokens`` chases its length.

    With steps in flight, `num_placeholders` tokens are being sampled: they count as tokens to compute next, but their
    ids are not in ``token_ids`` yet.
    """

    seq_id: int  # unique within the replica
    request_id: str
    index: int  # which of the request's sequences
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    arrival_time: float = 0.0

    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    group: int = 0  # attention group, meaningful while it holds blocks
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # chain digests of the full blocks of known tokens
    num_computed_tokens: int = 0  # KV written, or being written by a step in flight
    num_published_blocks: int = 0  # of the first blocks, those that can be found by their hash
    num_placeholders: int = 0
    num_in_flight: int = 0  # steps scheduled and not yet updated that include it
    num_cached_tokens: int = 0  # prompt tokens found cached when first admitted
    num_preemptions: int = 0
    num_lost_tokens: int = 0  # computed and given up again by preemptions, all of them together
    num_shared_blocks: int = 0  # of `block_ids`, those that others held when it was admitted
    max_computed_tokens: int = 0  # high-water mark: computing below it again is recomputation
    first_scheduled_time: float | None = None
    held_by_ranks: bool = False  # ranks have its state, so later steps need only name it
    num_blocks_sent: int = 0  # of `block_ids`, those the ranks know
    num_tokens_sent: int = 0  # of `token_ids`, those the ranks know (or fill in themselves)
    num_resumed_tokens: int = field(init=False)  # output tokens that it came with
    length_class: LengthClass = field(init=False)

    def __post_init__(self) -> None:
        self.num_resumed_tokens = self.num_output_tokens
        self.length_class = LengthClass.of(self.sampling, self.num_prompt_tokens)

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, resumed ones included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """Copy of the output."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens, placeholders included, whose KV is not computed yet."""
        return len(self.token_ids) + self.num_placeholders - self.num_computed_tokens

    @property
    def may_sample_more(self) -> bool:
        """False once the tokens in flight already reach the request's limit."""
        return self.num_output_tokens + self.num_placeholders < self.sampling.max_tokens


def finish_reason(request: Request, token_id: int) -> FinishReason | None:
    """Why the request ends with the token that it has just got; None when it goes on."""
    sampling, num_output_tokens = request.sampling, len(request.token_ids) - request.num_prompt_tokens
    if token_id in sampling.stop_token_ids and num_output_tokens >= sampling.min_tokens:
        request.stop_token_id = token_id
        return FinishReason.STOP
    if num_output_tokens >= sampling.max_tokens:
        return FinishReason.LENGTH
    return None
