"""Sparse models over the whole engine, in meshes that the scheduler, the executor and the ranks must agree on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.placement.expert_load import read_expert_load
from ridgewalk.placement.expert_map import balanced_expert_map
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.in_process_executor import InProcessExecutor
from ridgewalk.replica.offline import OfflineEngine
from tests.model.checkpoints import make_checkpoint
from tests.replica.test_offline_engine import assert_greedy, engine_config

Reference = tuple[Path, torch.nn.Module]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("sparse")
    return folder, make_checkpoint("deepseek-v3", folder)


def sparse_config(folder: Path, **changes: object) -> EngineConfig:
    return engine_config(folder, **{"num_blocks": 32, "max_model_len": 96, **changes})  # type: ignore[arg-type]


def serve_and_check(config: EngineConfig, model: torch.nn.Module, num_requests: int = 24) -> OfflineEngine:
    """Requests that share prefixes, through a cache so small that they are preempted; the engine, closed."""
    rng = random.Random(num_requests)
    shared = [rng.randrange(131) for _ in range(16)]
    prompts = [
        (shared if number % 3 else []) + [rng.randrange(131) for _ in range(rng.randint(1, 30))]
        for number in range(num_requests)
    ]
    sampling = [SamplingParams(max_tokens=rng.randint(1, 20), temperature=0.0) for _ in prompts]
    with OfflineEngine(config) as engine:
        requests = engine.generate(prompts, sampling)
    for request, params in zip(requests, sampling, strict=True):
        assert request.num_output_tokens == params.max_tokens
        assert_greedy(model, request)
    assert all(group.kv.pool.num_used == 0 for group in engine.core.scheduler.groups)
    return engine


def test_one_rank_in_this_process_serves_a_sparse_model(sparse: Reference) -> None:
    engine = serve_and_check(sparse_config(sparse[0]), sparse[1])
    assert isinstance(engine.executor, InProcessExecutor)
    assert engine.core.scheduler.counters.num_preemptions > 0


@pytest.mark.parametrize("mesh", [{"dp": 2}, {"dp": 2, "pp": 2}])
def test_a_mesh_with_expert_parallelism_equals_transformers(sparse: Reference, mesh: dict[str, int]) -> None:
    config = sparse_config(sparse[0], expert_parallel=True, num_blocks=24, **mesh)
    engine = serve_and_check(config, sparse[1])
    counters = engine.core.scheduler.counters
    assert counters.num_preemptions > 0
    assert counters.prefix_cache_hits > 0
    for ranks in engine.timings:
        assert [timings.rank for timings in ranks] == list(range(config.world_size))
    assert sum(timings.routed_tokens for ranks in engine.timings for timings in ranks) > 0


def test_loads_recorded_by_one_engine_place_the_experts_of_the_next(sparse: Reference, tmp_path: Path) -> None:
    folder, model = sparse
    path = tmp_path / "loads.json"
    config = sparse_config(folder, dp=2, expert_parallel=True, record_expert_load=str(path))
    engine = serve_and_check(config, model)
    moe = ModelSpec.from_folder(folder).moe
    assert moe is not None
    load = read_expert_load(path, moe)
    rows = sum(sum(map(sum, timings.expert_tokens)) for ranks in engine.timings for timings in ranks)
    assert sum(map(sum, load.layers)) == rows > 0
    assert len({sum(tokens) for tokens in load.layers}) == 1  # every layer sees every token, top_k times
    assert sum(load.layers[0]) % moe.top_k == 0
    placed = balanced_expert_map(moe, 2, 2, load.layers)
    layers = [[list(slots) for slots in layer] for layer in placed.layers]
    serve_and_check(
        sparse_config(folder, dp=2, expert_parallel=True, num_redundant_experts=2, expert_map=layers), model
    )
