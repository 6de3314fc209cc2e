"""Limits of one replica's scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AdmissionName = Literal["prompt_only", "predictive"]

MEASURE_EVERY = 17
"""One step in so many is timed on every rank: often enough for a 1 s scrape, under 1 % of the step time. Prime: the
micro-batches of a pipeline come round every few steps, and each of them must have its turn."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits per attention group unless said otherwise.

    Raises:
        ValueError: a limit is not positive, or a sequence of `max_model_len` tokens does not fit in the cache.
    """

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 4096  # prompt + output tokens of one sequence
    max_num_seqs: int = 256  # sequences running at once
    max_num_batched_tokens: int = 2048  # tokens computed in one step
    max_steps_in_flight: int = 1  # of the replica; over 1, steps are scheduled before earlier ones have ended
    schedule_ahead: bool = False  # a sequence may be in several steps in flight (placeholders); needs one stage
    num_groups: int = 1  # attention groups of the replica
    enable_prefix_caching: bool = True
    num_swap_blocks: int = 0  # of each attention group, on the host: for what preempted sequences had
    admission: AdmissionName = "prompt_only"  # by the KV of known tokens, or by the predicted peak
    measure_every: int = MEASURE_EVERY  # steps from one that is timed on every rank to the next
    counts_only: bool = False  # simulations: tokens and blocks are counted, and have no ids

    @property
    def micro_batches(self) -> bool:
        """True when steps in flight share the sequences out: each is in one of them at most."""
        return self.max_steps_in_flight > 1 and not self.schedule_ahead

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
                     "max_steps_in_flight", "num_groups", "measure_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_swap_blocks < 0:
            raise ValueError(f"num_swap_blocks must not be negative, got {self.num_swap_blocks}")
        if self.num_swap_blocks and not self.enable_prefix_caching:
            raise ValueError(
                "swap_space needs enable_prefix_caching: blocks on the host are found by the hash of their content"
            )
        if self.num_swap_blocks and self.counts_only:
            raise ValueError("counts_only knows no swap space")
        if self.max_model_len > self.num_blocks * self.block_size:
            raise ValueError(
                f"one sequence of max_model_len {self.max_model_len} tokens does not fit in {self.num_blocks} blocks "
                f"of {self.block_size}; lower --max-model-len or raise --memory (or --num-blocks)"
            )
