"""size_cache: what a replica's ranks get of the memory there is, every stage of a pipeline considered."""

from __future__ import annotations

import pytest

from ridgewalk.placement.memory import GIB, MemoryPlanError
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.sizing import CPU_SHARE, GPU_SHARE, STATED_SHARE, size_cache
from tests.placement.hub_configs import DEEPSEEK_V2_LITE

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


@pytest.mark.parametrize(("device", "share"), [("cpu", CPU_SHARE / 2), ("cuda", GPU_SHARE)])
def test_every_stage_fits_into_its_share(device, share):
    plan = size_cache(config(device=device), SPEC, 64 * GIB)
    assert len(plan.stages) == 2
    assert most_used(plan) <= plan.budget_bytes == int(64 * GIB * share)


def test_stated_blocks_are_checked_on_every_stage():
    plan = size_cache(config(num_blocks=1000), SPEC, 80 * GIB)
    assert plan.num_blocks == 1000
    with pytest.raises(MemoryPlanError, match=r"num_blocks 1000000 needs .* lower --num-blocks to (\d+)") as refused:
        size_cache(config(num_blocks=1_000_000), SPEC, 80 * GIB)
    named = int(str(refused.value).rsplit(" ", 1)[1])
    fitting = size_cache(config(num_blocks=named), SPEC, 80 * GIB)
    assert most_used(fitting) <= int(80 * GIB * STATED_SHARE / 2)
    with pytest.raises(MemoryPlanError):
        size_cache(config(num_blocks=named + 1), SPEC, 80 * GIB)


def test_stated_memory_over_what_there_is_is_refused():
    with pytest.raises(MemoryPlanError, match="lower --memory to"):
        size_cache(config(memory=40 * GIB, max_num_seqs=4096), SPEC, 64 * GIB)


def test_redundant_experts_are_budgeted():
    mesh = {"pp": 1, "dp": 2, "expert_parallel": True, "num_blocks": 1000}
    plain = size_cache(config(**mesh), SPEC, 100 * GIB)
    redundant = size_cache(config(**mesh, num_redundant_experts=2), SPEC, 100 * GIB)
    assert redundant.weight_bytes - plain.weight_bytes == 26 * 3 * 2048 * 1408 * 2
