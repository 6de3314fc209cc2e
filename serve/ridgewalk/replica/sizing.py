"""How much memory and how many threads a rank gets when nobody says."""

from __future__ import annotations

from dataclasses import replace

from ridgewalk.placement.memory import MemoryPlan, plan_memory
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.host import num_cores

CPU_SHARE = 0.5
"""Of a host's memory, for all ranks on it together: the rest is the operating system's, Ray's and the page cache's."""

GPU_SHARE = 0.9
"""Of a device's memory (as vLLM's ``gpu_memory_utilization``)."""


def size_cache(config: EngineConfig, spec: ModelSpec, available_bytes: int) -> MemoryPlan:
    """Memory of one rank, given what the poorest rank's device (CUDA) or host (CPU) has.

    Raises:
        MemoryPlanError: the weights, or one sequence of ``max_model_len``, do not fit.
    """
    share = GPU_SHARE if config.device == "cuda" else CPU_SHARE / max(config.ranks_per_host, config.world_size)
    budget = config.memory if config.memory is not None else int(available_bytes * share)
    if config.num_blocks is not None:
        budget = 2**63  # the cache is stated: the plan tells what everything else takes
    plan = plan_memory(
        spec,
        Mesh(tp=config.tp, pp=config.pp, dp=config.dp),
        config.dtype,
        budget,
        config.block_size,
        config.max_num_batched_tokens,
        config.max_num_seqs,
        config.max_model_len,
    )
    return plan if config.num_blocks is None else replace(plan, num_blocks=config.num_blocks)


def num_threads(config: EngineConfig, ranks_on_host: int) -> int:
    """Threads of one rank, so that the ranks of a host do not fight for its cores."""
    if config.threads_per_rank is not None:
        return config.threads_per_rank
    return max(1, num_cores() // max(config.ranks_per_host, ranks_on_host))
