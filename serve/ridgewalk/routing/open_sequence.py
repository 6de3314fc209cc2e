"""Sequences as the router sees them: about to be sent, and on their way."""

from __future__ import annotations

from dataclasses import dataclass

from ridgewalk.engine.length_class import LengthClass
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo


@dataclass(frozen=True)
class NewSequence:
    """One sequence of a request that a replica is sought for."""

    kind: LengthClass
    num_prompt_tokens: int
    max_tokens: int  # resumed tokens included
    may_stop: bool = True  # before ``max_tokens``
    num_resumed_tokens: int = 0  # output that it has had elsewhere
    prefix: tuple[int, ...] = ()  # chained hashes of its prompt's blocks, see `prefix_index`
    slo: LatencySlo = NO_SLO

    @property
    def num_known_tokens(self) -> int:
        """To be computed before it writes: resumed tokens are computed like a prompt."""
        return self.num_prompt_tokens + self.num_resumed_tokens

    @classmethod
    def of(
        cls,
        sampling: SamplingParams,
        num_prompt_tokens: int,
        num_resumed_tokens: int = 0,
        prefix: tuple[int, ...] = (),
        slo: LatencySlo = NO_SLO,
    ) -> NewSequence:
        """What ``sampling`` asks with a prompt so long."""
        kind = LengthClass.of(sampling, num_prompt_tokens)
        may_stop = bool(sampling.stop_token_ids)
        return cls(kind, num_prompt_tokens, sampling.max_tokens, may_stop, num_resumed_tokens, prefix, slo)


@dataclass(eq=False)
class OpenSequence:
    """One that was sent. Whoever follows its tokens tells of them with `on_tokens`."""

    new: NewSequence
    replica_id: str
    sent_at: float  # seconds
    num_output_tokens: int  # resumed ones included
    first_token_at: float | None = None  # seconds; None before a token came from this replica

    @property
    def num_written(self) -> int:
        """Tokens that came from this replica."""
        return self.num_output_tokens - self.new.num_resumed_tokens

    def on_tokens(self, num_output_tokens: int, now: float) -> None:
        """It has so many by now."""
        self.num_output_tokens = num_output_tokens
        if self.first_token_at is None and self.num_written > 0:
            self.first_token_at = now
