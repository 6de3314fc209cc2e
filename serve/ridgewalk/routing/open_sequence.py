"""Sequences as the router sees them: about to be sent, and on their way."""

from __future__ import annotations

from dataclasses import dataclass

from ridgewalk.engine.output_lengths import LengthClass, class_of
from ridgewalk.engine.sampling import SamplingParams


@dataclass(frozen=True)
class NewSequence:
    """One sequence of a request that a replica is sought for."""

    kind: LengthClass
    num_prompt_tokens: int
    max_tokens: int  # resumed tokens included
    may_stop: bool = True  # before ``max_tokens``
    num_resumed_tokens: int = 0  # output that it has had elsewhere
    prefix: tuple[int, ...] = ()  # chained hashes of its prompt's blocks, see `prefix_index`

    @classmethod
    def of(
        cls, sampling: SamplingParams, num_prompt_tokens: int, num_resumed_tokens: int = 0, prefix: tuple[int, ...] = ()
    ) -> NewSequence:
        """What ``sampling`` asks with a prompt so long."""
        kind = class_of(sampling, num_prompt_tokens)
        may_stop = bool(sampling.stop_token_ids)
        return cls(kind, num_prompt_tokens, sampling.max_tokens, may_stop, num_resumed_tokens, prefix)


@dataclass(eq=False)
class OpenSequence:
    """One that was sent. Whoever follows its tokens keeps ``num_output_tokens`` up to date."""

    new: NewSequence
    replica_id: str
    sent_at: float  # seconds
    num_output_tokens: int  # resumed ones included
