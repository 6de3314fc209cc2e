"""size_cache: what a replica's ranks get of the memory there is, every stage of a pipeline considered."""

from __future__ import annotations

import re

import pytest

from ridgewalk.placement.memory import GIB, MemoryPlanError
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.sizing import (
    CPU_SHARE,
    GPU_SHARE,
    RANK_PROCESS_BYTES,
    STATED_SHARE,
    SWAP_HOST_SHARE,
    check_host_memory,
    num_threads,
    size_cache,
)
from tests.placement.hub_configs import DEEPSEEK_V2_LITE
from tests.small_configs import SMALL_MOE

SPEC = ModelSpec.from_config(DEEPSEEK_V2_LITE)


def config(**changes):
    fields = {
        "model_name": "m",
        "placement": "PP2",
        "model_path": "",
        "dtype": "bfloat16",
        "pp": 2,
        "max_model_len": 4096,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "max_waiting": 100,
        "block_size": 16,
    }
    return EngineConfig(**{**fields, **changes})


def most_used(plan):
    return max(stage.used_bytes(plan.num_blocks) for stage in plan.stages)


@pytest.mark.parametrize(
    ("device", "share", "process"), [("cpu", CPU_SHARE / 2, RANK_PROCESS_BYTES), ("cuda", GPU_SHARE, 0)]
)
def test_every_stage_fits_into_its_share(device, share, process):
    plan = size_cache(config(device=device), SPEC, 64 * GIB)
    assert len(plan.stages) == 2
    assert most_used(plan) <= plan.budget_bytes == int(64 * GIB * share) - process


def test_stated_blocks_are_checked_on_every_stage():
    plan = size_cache(config(num_blocks=1000), SPEC, 80 * GIB)
    assert plan.num_blocks == 1000
    with pytest.raises(MemoryPlanError, match=r"num_blocks 1000000 needs .* lower --num-blocks to (\d+)") as refused:
        size_cache(config(num_blocks=1_000_000), SPEC, 80 * GIB)
    named = int(str(refused.value).rsplit(" ", 1)[1])
    fitting = size_cache(config(num_blocks=named), SPEC, 80 * GIB)
    assert most_used(fitting) <= int(80 * GIB * STATED_SHARE / 2) - RANK_PROCESS_BYTES
    with pytest.raises(MemoryPlanError):
        size_cache(config(num_blocks=named + 1), SPEC, 80 * GIB)


def test_stated_memory_over_what_there_is_is_refused():
    with pytest.raises(MemoryPlanError, match="lower --memory to"):
        size_cache(config(memory=40 * GIB, max_num_seqs=4096), SPEC, 64 * GIB)


def test_swap_space_holds_as_many_blocks_on_every_stage():
    plan = size_cache(config(num_blocks=1000, swap_space=GIB), SPEC, 80 * GIB)
    largest = max(stage.kv_bytes_per_block for stage in plan.stages)
    assert plan.num_swap_blocks == GIB // largest
    assert config().scheduler_config(plan).num_swap_blocks == plan.num_swap_blocks
    assert plan.describe_room() == f"16,000 tokens and swap space for {16 * plan.num_swap_blocks:,}"


def test_cpu_ranks_get_half_of_the_cache_as_swap_space_as_far_as_there_is_memory():
    assert size_cache(config(num_blocks=1001), SPEC, 80 * GIB).num_swap_blocks == 501
    assert size_cache(config(num_blocks=1001), SPEC, None).num_swap_blocks == 501
    for without in (
        {"swap_space": 0},
        {"device": "cuda"},
        {"admission": "prompt_only"},
        {"enable_prefix_caching": False},
    ):
        assert size_cache(config(num_blocks=1001, **without), SPEC, 80 * GIB).num_swap_blocks == 0, without
    shared = size_cache(config(max_num_seqs=4096), SPEC, 160 * GIB)  # half of the host for the model
    an_eighth = int(160 * GIB * SWAP_HOST_SHARE / 2)
    assert shared.num_swap_blocks == an_eighth // shared.largest_kv_bytes_per_block
    assert shared.num_swap_blocks < shared.num_blocks / 2
    with pytest.raises(MemoryPlanError) as refused:
        size_cache(config(num_blocks=10**9), SPEC, 80 * GIB)
    most = int(re.search(r"lower --num-blocks to (\d+)", str(refused.value))[1])
    assert size_cache(config(num_blocks=most), SPEC, 80 * GIB).num_swap_blocks < 10  # the host is full


def test_swap_space_that_holds_nothing_or_has_no_room_is_refused():
    with pytest.raises(MemoryPlanError, match=r"swap_space of 4 bytes does not hold one KV block.*as 4GiB"):
        size_cache(config(num_blocks=1000, swap_space=4), SPEC, 80 * GIB)
    with pytest.raises(
        MemoryPlanError, match=r"swap_space 60.00 GiB .* of this host's memory; lower --swap-space, or 0 for none"
    ):
        size_cache(config(num_blocks=1000, swap_space=60 * GIB), SPEC, 80 * GIB)
    on_gpus = config(num_blocks=1000, swap_space=60 * GIB, device="cuda")
    size_cache(on_gpus, SPEC, 80 * GIB)
    check_host_memory(on_gpus, 256 * GIB, 2)
    with pytest.raises(MemoryPlanError, match=r"a host of 100.00 GiB has for each of 2 ranks"):
        check_host_memory(on_gpus, 100 * GIB, 2)
    shared = config(num_blocks=1000, swap_space=60 * GIB, device="cuda", ranks_per_host=8)  # with other replicas
    with pytest.raises(MemoryPlanError, match=r"a host of 256.00 GiB has for each of 8 ranks"):
        check_host_memory(shared, 256 * GIB, 2)


def test_small_ranks_share_a_small_machine():
    small = ModelSpec.from_config(SMALL_MOE)
    limits = {"max_model_len": 256, "pp": 4, "tp": 2}
    plan = size_cache(config(**limits), small, 16 * GIB)
    assert plan.budget_bytes == GIB - RANK_PROCESS_BYTES
    stated = size_cache(config(**limits, memory=64 * 2**20), small, 16 * GIB)
    assert stated.budget_bytes == 64 * 2**20


@pytest.mark.parametrize(
    ("changes", "available", "message"),
    [
        (
            {"ranks_per_host": 96},
            24,
            r"but the default share of this machine's 24\.00 GiB gives each of 96 ranks "
            r"\(beside 0\.25 GiB for its process\) 0\.00 MiB; use fewer ranks or state --memory$",
        ),
        ({"pp": 1}, 24, r"24\.00 GiB gives the one rank .* 11\.75 GiB; state --memory$"),
        (
            {"device": "cuda"},
            16,
            r"this device's 16\.00 GiB gives a rank 14\.40 GiB; raise -tp or -pp, or state --memory$",
        ),
        ({"memory": GIB}, 64, r"but --memory gives 1\.00 GiB; raise --memory, -tp or -pp$"),
        (
            {"memory": 40 * GIB},
            24,
            "a rank can have 11.15 GiB of this host's memory; use fewer ranks or a machine with",
        ),
        ({"num_blocks": 1000}, 24, "11.15 GiB of this host's memory; use fewer ranks or a machine with more memory$"),
    ],
)
def test_a_refusal_names_what_gave_the_budget_and_what_helps(changes, available, message):
    with pytest.raises(MemoryPlanError, match=message):
        size_cache(config(**changes), SPEC, available * GIB)


def test_a_context_that_default_memory_cannot_hold_is_not_blamed_on_a_flag():
    small = ModelSpec.from_config({**SMALL_MOE, "max_position_embeddings": 10**8})
    with pytest.raises(MemoryPlanError, match=r"gives the one rank .* is left beside .* or state --memory$") as refused:
        size_cache(config(pp=1, max_model_len=10**8), small, 16 * GIB)
    assert "raise" not in str(refused.value)


def test_redundant_experts_are_budgeted():
    mesh = {"pp": 1, "dp": 2, "expert_parallel": True, "num_blocks": 1000}
    plain = size_cache(config(**mesh), SPEC, 100 * GIB)
    redundant = size_cache(config(**mesh, num_redundant_experts=2), SPEC, 100 * GIB)
    assert redundant.weight_bytes - plain.weight_bytes == 26 * 3 * 2048 * 1408 * 2


def test_ranks_share_out_the_cpus_they_are_bound_to_as_threads():
    assert num_threads(config(cpus=tuple(range(8))), 2) == 4
    assert num_threads(config(cpus=tuple(range(8)), ranks_on_cpus=3), 2) == 2
    assert num_threads(config(cpus=(0,), ranks_on_cpus=3), 2) == 1
    assert num_threads(config(cpus=(0, 1), threads_per_rank=5), 2) == 5
