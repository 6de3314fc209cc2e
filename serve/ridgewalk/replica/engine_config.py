"""What one engine replica is told: plain data, resolved from the user's configuration before anything starts."""

from __future__ import annotations

import msgspec

from ridgewalk.engine.scheduler_config import MEASURE_EVERY, AdmissionName, SchedulerConfig
from ridgewalk.model.runner_config import RunnerConfig
from ridgewalk.placement.memory import MemoryPlan
from ridgewalk.placement.mesh import Mesh

MEASURE_EVERY_ON_GPUS = 167
"""A measured step is not one of `model.decode_graphs`, and takes up to twice as long. Prime, as `MEASURE_EVERY` is."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an `EngineReplica` and its ranks need. Sizes in bytes, lengths in tokens."""

    model_name: str  # as clients and metrics call it
    placement: str  # e.g. DP2xTP2
    model_path: str  # a folder that every node can read
    dtype: str  # bfloat16 | float16 | float32
    tp: int = 1
    pp: int = 1
    dp: int = 1
    expert_parallel: bool = False
    num_redundant_experts: int = 0  # per sparse layer
    expert_map: list[list[list[int]]] | None = None  # `ExpertMap.layers`; None: uniform
    expert_imbalance: tuple[float, float] | None = None  # worst layer's, at the observed loads: uniform, `expert_map`
    record_expert_load: str | None = None  # absolute path of a file that observed expert loads are written to
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    enable_prefix_caching: bool = True
    admission: AdmissionName = "predictive"
    max_waiting: int  # waiting sequences of this replica; beyond it a call is answered OVERLOADED
    memory: int | None = None  # per rank
    num_blocks: int | None = None  # per attention group
    swap_space: int | None = None  # bytes of host memory per rank, beside `memory`; None: `size_cache` decides
    device: str = "cpu"  # cpu | cuda
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    threads_per_rank: int | None = None
    cpus: tuple[int, ...] | None = None  # of its host, on which alone a rank in a process of its own runs
    schedule_ahead: bool = True  # steps in flight may hold the same sequence (placeholders); not in a pipeline
    max_steps_in_flight: int = 2  # at least one for each stage of a pipeline; 1 with neither stages nor the above
    peak_flops_per_rank: float | None = None  # per second; None: no utilization of it is exported
    peak_bandwidth_per_rank: int | None = None  # bytes per second of memory; None: likewise
    ranks_per_host: int = 1  # of the whole service: its default share of memory and cores follows
    ranks_on_cpus: int = 1  # of those, the ones that are bound to some of `cpus`

    @property
    def mesh(self) -> Mesh:
        """The replica's mesh."""
        return Mesh(tp=self.tp, pp=self.pp, dp=self.dp, expert_parallel=self.expert_parallel)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.mesh.world_size

    @property
    def schedules_ahead(self) -> bool:
        """True when steps in flight may hold the same sequence: all ranks must learn the tokens that one samples."""
        return self.schedule_ahead and self.pp == 1

    def scheduler_config(self, memory: MemoryPlan) -> SchedulerConfig:
        """The scheduler's limits for a replica with so much room for KV.

        Raises:
            ValueError: the limits cannot work together.
        """
        return SchedulerConfig(
            num_blocks=memory.num_blocks,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_steps_in_flight=max(self.max_steps_in_flight, self.pp) if self.schedules_ahead or self.pp > 1 else 1,
            schedule_ahead=self.schedules_ahead,
            num_groups=self.dp,
            enable_prefix_caching=self.enable_prefix_caching,
            num_swap_blocks=memory.num_swap_blocks,
            admission=self.admission,
            measure_every=MEASURE_EVERY_ON_GPUS if self.device == "cuda" else MEASURE_EVERY,
        )

    def runner_config(
        self, rank: int, num_threads: int, init_method: str = "", keeps_fp8: bool = False
    ) -> RunnerConfig:
        """What one rank is told to run.

        Args:
            rank: flat rank in the mesh.
            num_threads: of a CPU rank.
            init_method: where the ranks meet, when there are several.
            keeps_fp8: every rank's device multiplies FP8.
        """
        return RunnerConfig(
            model=self.model_path,
            dtype=self.dtype,
            device=self.device,
            rank=rank,
            tp=self.tp,
            pp=self.pp,
            dp=self.dp,
            expert_parallel=self.expert_parallel,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            num_threads=num_threads,
            init_method=init_method,
            tokens_broadcast=self.schedules_ahead,
            expert_map=self.expert_map,
            keeps_fp8=keeps_fp8,
        )


def describe_mesh(config: EngineConfig) -> str:
    """The ranks of a replica in words, e.g. ``4 ranks: 2 attention groups x 2 tensor-parallel, experts over 4``."""
    parts = []
    if config.pp > 1:
        parts.append(f"{config.pp} stages")
    if config.dp > 1:
        parts.append(f"{config.dp} attention groups")
    if config.tp > 1:
        parts.append(f"{config.tp} tensor-parallel")
    experts = f", experts over {config.dp * config.tp}" if config.expert_parallel else ""
    ranks = "1 rank" if config.world_size == 1 else f"{config.world_size} ranks"
    return f"{ranks}: {' x '.join(parts)}{experts}" if parts else f"{ranks}{experts}"


def describe_expert_balance(config: EngineConfig) -> str:
    """What placing experts by observed load gains, as the end of a sentence; empty where they are placed in order."""
    if config.expert_imbalance is None:
        return ""
    before, after = config.expert_imbalance
    return (
        f"; at the observed loads the busiest expert-parallel rank of the worst layer has {after:.2f} times the mean, "
        f"{before:.2f} without ({config.num_redundant_experts} redundant experts a layer)"
    )
