"""What one engine replica is told: plain data, resolved from the user's configuration before anything starts."""

from __future__ import annotations

import msgspec

from ridgewalk.engine.scheduler_config import SchedulerConfig


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an `EngineReplica` and its ranks need. Sizes in bytes, lengths in tokens."""

    model_name: str  # as clients and metrics call it
    placement: str  # e.g. DP2xTP2
    model_path: str  # a folder that every node can read
    dtype: str  # bfloat16 | float16 | float32
    tp: int = 1
    pp: int = 1
    dp: int = 1
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    enable_prefix_caching: bool = True
    max_waiting: int  # waiting sequences of this replica; beyond it a call is answered OVERLOADED
    memory: int | None = None  # per rank
    num_blocks: int | None = None  # per attention group
    device: str = "cpu"  # cpu | cuda
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    threads_per_rank: int | None = None
    max_steps_in_flight: int = 2
    schedule_ahead: bool = True  # steps in flight may hold the same sequence (placeholders)
    ranks_per_host: int = 1  # of the whole service: its default share of memory and cores follows

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def scheduler_config(self, num_blocks: int) -> SchedulerConfig:
        """The scheduler's limits for a replica with so many KV blocks per attention group.

        Raises:
            ValueError: the limits cannot work together.
        """
        return SchedulerConfig(
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_steps_in_flight=self.max_steps_in_flight,
            schedule_ahead=self.schedule_ahead,
            num_groups=self.dp,
            enable_prefix_caching=self.enable_prefix_caching,
        )
