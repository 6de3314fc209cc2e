"""How much memory and how many threads a rank gets when nobody says.

Swap space, when nobody says, is half of the KV cache on CPU ranks under predictive admission, as far as an eighth of
the host's memory goes. Admission then lets more requests begin and computes next to nothing twice (RESULTS.md,
"Admission"). It is memory beside `memory`, taken as preempted requests are swapped out, and kept. Under `prompt_only`
it must be stated: what is preempted there is more than that, and has not been measured. So it must on CUDA: steps wait
for its copies, and how long has not been measured either.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ridgewalk.machine import num_cores
from ridgewalk.placement.memory import GIB, STATED, BudgetSource, MemoryPlan, MemoryPlanError, plan_memory
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig

CPU_SHARE = 0.5
"""Of a host's memory, for all ranks on it together: the rest is the operating system's, Ray's and the page cache's."""

GPU_SHARE = 0.9
"""Of a device's memory (as vLLM's ``gpu_memory_utilization``)."""

STATED_SHARE = 0.95
"""Of either, when the user states `memory` or `num_blocks`. Over that Ray's memory monitor kills ranks."""

RANK_PROCESS_BYTES = GIB // 4
"""What a CPU rank's process takes before it holds anything of a model: measured 255 MiB of private memory (torch, its
thread pools, the transports). On CUDA the device's share is the budget, and the host's counts for swap space alone."""

SWAP_SHARE = 0.5
"""Of the KV cache: swap space of CPU ranks by default. On a real rank, with nine preemptions, a quarter had 3 % of the
tokens computed twice, and a half 0.2 %."""

SWAP_HOST_SHARE = 0.125
"""Of a host's memory, for the default swap space of all ranks on it together, beside `CPU_SHARE` or what is stated; and
no more than half of what these leave."""

_UNBOUNDED = 2**63


def size_cache(
    config: EngineConfig, spec: ModelSpec, available_bytes: int | None, keeps_fp8: bool = False
) -> MemoryPlan:
    """Memory of one rank, given what the poorest rank's device (CUDA) or host (CPU) has.

    ``available_bytes`` None: unknown. Then `memory` or `num_blocks` must be stated, and only they are checked.
    ``keeps_fp8``: every rank's device multiplies FP8, so that weights in FP8 stay in it.

    Raises:
        MemoryPlanError: the weights, or one sequence of ``max_model_len``, do not fit, or the stated memory or blocks
            are more than there is.
    """
    ranks_sharing = 1 if config.device == "cuda" else max(config.ranks_per_host, config.world_size)
    source = STATED
    if config.num_blocks is not None:
        budget = _UNBOUNDED  # the cache is stated: the plan tells what everything else takes
    elif config.memory is not None:
        budget = config.memory
    else:
        assert available_bytes is not None, "without memory and num_blocks the memory there is must be known"
        share = GPU_SHARE if config.device == "cuda" else CPU_SHARE
        budget = _rank_share(config, available_bytes, share, ranks_sharing)
        source = _default_source(config, available_bytes, ranks_sharing)
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
        source=source,
        keeps_fp8=keeps_fp8,
    )
    if config.num_blocks is not None:
        plan = replace(plan, num_blocks=config.num_blocks)
    spare: float = math.inf  # of the host's memory, for swap space by default
    if available_bytes is not None:
        limit = _rank_share(config, available_bytes, STATED_SHARE, ranks_sharing)
        _check_stated(config, plan, limit)
        if config.device == "cpu":
            left = limit - plan.weight_bytes - plan.activation_bytes - plan.kv_bytes
            _check_swap_space(config, left, "weights, activations and KV cache leave of this host's memory")
            spare = min(left / 2, available_bytes * SWAP_HOST_SHARE / ranks_sharing)
    return _with_swap_space(config, plan, spare)


def check_host_memory(config: EngineConfig, host_bytes: int, own_ranks: int) -> None:
    """Refuse swap space of CUDA ranks for which their host has no room. ``own_ranks``: of the replica, on it.

    Raises:
        MemoryPlanError: it has not.
    """
    if config.device == "cuda":
        ranks = max(config.ranks_per_host, own_ranks)
        left = int(host_bytes * STATED_SHARE / ranks) - RANK_PROCESS_BYTES
        _check_swap_space(config, left, f"a host of {_gib(host_bytes)} has for each of {ranks} ranks")


def num_threads(config: EngineConfig, ranks_on_host: int) -> int:
    """Threads of one rank, so that the ranks of a host do not fight for its cores."""
    if config.threads_per_rank is not None:
        return config.threads_per_rank
    if config.cpus is not None:
        return max(1, len(config.cpus) // max(config.ranks_on_cpus, ranks_on_host))
    return max(1, num_cores() // max(config.ranks_per_host, ranks_on_host))


def _with_swap_space(config: EngineConfig, plan: MemoryPlan, spare: float) -> MemoryPlan:
    """What is stated, or what suits admission by default, as far as there is memory."""
    if config.swap_space is None:
        if config.device == "cuda" or config.admission != "predictive" or not config.enable_prefix_caching:
            return plan
        wanted = math.ceil(SWAP_SHARE * plan.num_blocks)
        return plan.with_swap_space(int(min(wanted * plan.largest_kv_bytes_per_block, max(spare, 0))))
    plan = plan.with_swap_space(config.swap_space)
    if config.swap_space and not plan.num_swap_blocks:
        raise MemoryPlanError(
            f"swap_space of {config.swap_space:,} bytes does not hold one KV block; raise --swap-space, "
            "which takes units, as 4GiB"
        )
    return plan


def _rank_share(config: EngineConfig, available_bytes: int, share: float, ranks_sharing: int) -> int:
    """What one rank can have for the model, when all together may have ``share``."""
    process = 0 if config.device == "cuda" else RANK_PROCESS_BYTES
    return max(0, int(available_bytes * share / ranks_sharing) - process)


def _default_source(config: EngineConfig, available_bytes: int, ranks_sharing: int) -> BudgetSource:
    if config.device == "cuda":
        share = f"the default share of this device's {_gib(available_bytes)} gives a rank"
        return BudgetSource(share, "raise -tp or -pp, or state --memory")
    share = f"the default share of this machine's {_gib(available_bytes)} gives"
    process = f"(beside {_gib(RANK_PROCESS_BYTES)} for its process)"
    if ranks_sharing == 1:
        return BudgetSource(f"{share} the one rank {process}", "state --memory")
    return BudgetSource(f"{share} each of {ranks_sharing} ranks {process}", "use fewer ranks or state --memory")


def _check_stated(config: EngineConfig, plan: MemoryPlan, limit: int) -> None:
    beside = plan.weight_bytes + plan.activation_bytes
    if beside + plan.kv_bytes <= limit:
        return
    where = "device" if config.device == "cuda" else "host"
    figures = (
        f"{_gib(plan.kv_bytes)} of KV cache beside {_gib(beside)} of weights and activations per rank, but a rank can "
        f"have {_gib(limit)} of this {where}'s memory"
    )
    fitting = plan.blocks_within(limit)
    others = "raise -tp or -pp" if config.device == "cuda" else "use fewer ranks or a machine with more memory"
    if config.num_blocks is not None:
        remedy = f"lower --num-blocks to {fitting}" if fitting else others
        raise MemoryPlanError(f"num_blocks {config.num_blocks} needs {figures}; {remedy}")
    remedy = f"lower --memory to {_gib(limit)}" if fitting else others
    raise MemoryPlanError(f"memory {_gib(config.memory or 0)} means {figures}; {remedy}")


def _check_swap_space(config: EngineConfig, left: int, whence: str) -> None:
    if config.swap_space is not None and config.swap_space > left:
        raise MemoryPlanError(
            f"swap_space {_gib(config.swap_space)} per rank is more than the {_gib(left)} that {whence}; "
            "lower --swap-space, or 0 for none"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
