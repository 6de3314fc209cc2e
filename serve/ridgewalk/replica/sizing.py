"""How much memory and how many threads a rank gets when nobody says."""

from __future__ import annotations

from dataclasses import replace

from ridgewalk.placement.memory import MemoryPlan, MemoryPlanError, plan_memory
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.host import num_cores

CPU_SHARE = 0.5
"""Of a host's memory, for all ranks on it together: the rest is the operating system's, Ray's and the page cache's."""

GPU_SHARE = 0.9
"""Of a device's memory (as vLLM's ``gpu_memory_utilization``)."""

STATED_SHARE = 0.95
"""Of either, when the user states `memory` or `num_blocks`. Over that Ray's memory monitor kills ranks."""

_UNBOUNDED = 2**63


def size_cache(config: EngineConfig, spec: ModelSpec, available_bytes: int | None) -> MemoryPlan:
    """Memory of one rank, given what the poorest rank's device (CUDA) or host (CPU) has.

    ``available_bytes`` None: unknown. Then `memory` or `num_blocks` must be stated, and only they are checked.

    Raises:
        MemoryPlanError: the weights, or one sequence of ``max_model_len``, do not fit, or the stated memory or blocks
            are more than there is.
    """
    ranks_sharing = 1 if config.device == "cuda" else max(config.ranks_per_host, config.world_size)
    budget = _UNBOUNDED  # with num_blocks the cache is stated: the plan tells what everything else takes
    if config.num_blocks is None:
        budget = config.memory if config.memory is not None else _default_budget(config, available_bytes, ranks_sharing)
    plan = plan_memory(
        spec,
        config.mesh,
        config.dtype,
        budget,
        config.block_size,
        config.max_num_batched_tokens,
        config.max_num_seqs,
        config.max_model_len,
        num_redundant_experts=config.num_redundant_experts,
    )
    if config.num_blocks is not None:
        plan = replace(plan, num_blocks=config.num_blocks)
    if available_bytes is not None:
        _check_stated(config, plan, int(available_bytes * STATED_SHARE / ranks_sharing))
    return plan


def num_threads(config: EngineConfig, ranks_on_host: int) -> int:
    """Threads of one rank, so that the ranks of a host do not fight for its cores."""
    if config.threads_per_rank is not None:
        return config.threads_per_rank
    return max(1, num_cores() // max(config.ranks_per_host, ranks_on_host))


def _default_budget(config: EngineConfig, available_bytes: int | None, ranks_sharing: int) -> int:
    assert available_bytes is not None, "without memory and num_blocks the memory there is must be known"
    return int(available_bytes * (GPU_SHARE if config.device == "cuda" else CPU_SHARE) / ranks_sharing)


def _check_stated(config: EngineConfig, plan: MemoryPlan, limit: int) -> None:
    beside = plan.weight_bytes + plan.activation_bytes
    if beside + plan.kv_bytes <= limit:
        return
    where = "device" if config.device == "cuda" else "host"
    figures = (
        f"{_gib(plan.kv_bytes)} of KV cache beside {_gib(beside)} of weights and activations per rank, but a rank can "
        f"have {_gib(limit)} of this {where}'s memory"
    )
    if config.num_blocks is not None:
        fitting = plan.blocks_within(limit)
        raise MemoryPlanError(f"num_blocks {config.num_blocks} needs {figures}; lower --num-blocks to {fitting}")
    raise MemoryPlanError(f"memory {_gib(config.memory or 0)} means {figures}; lower --memory to {_gib(limit)}")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
