"""The whole engine over real rank processes: scheduler, executor, model; no Ray, no HTTP."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from ridgewalk.engine.executor import ExecutorError
from ridgewalk.engine.request import Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.placement.memory import MemoryPlanError
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine
from ridgewalk.replica.rank_protocol import RankLaunch
from ridgewalk.replica.spawned_ranks import SpawnedRanks
from ridgewalk.replica.zmq_executor import ZmqExecutor
from tests.model.checkpoints import make_checkpoint

GAP = 1e-4


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, make_checkpoint("qwen3", folder)


def engine_config(folder: Path, tp: int = 1, **changes: object) -> EngineConfig:
    settings: dict[str, object] = {
        "model_name": "tiny",
        "placement": f"TP{tp}",
        "model_path": str(folder),
        "dtype": "float32",
        "tp": tp,
        "max_model_len": 128,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 48,
        "block_size": 4,
        "max_waiting": 100,
        "num_blocks": 64,
        "threads_per_rank": 1,
        "admission": "prompt_only",  # the policy under which much is preempted
    }
    return EngineConfig(**{**settings, **changes})  # type: ignore[arg-type]


def assert_greedy(model: torch.nn.Module, request: Request) -> None:
    with torch.inference_mode():
        logits = model(torch.tensor([request.token_ids])).logits[0]
    for position in range(request.num_prompt_tokens, request.num_tokens):
        best = logits[position - 1].topk(2)
        close = float(best.values[0] - best.values[1]) < GAP
        token = request.token_ids[position]
        assert token == best.indices[0] or (close and token == best.indices[1])


@pytest.mark.parametrize(
    ("tp", "pp", "ahead", "swap"),
    [
        (1, 1, False, False),
        (2, 1, False, False),
        (2, 1, True, True),
        (4, 1, False, False),
        (1, 2, False, False),
        (2, 2, False, True),
    ],
)
def test_32_interleaved_requests_equal_transformers(
    reference: tuple[Path, torch.nn.Module], tp: int, pp: int, ahead: bool, swap: bool
) -> None:
    """Budget and cache are so small that prompts are chunked, prefixes shared and requests preempted."""
    folder, model = reference
    rng = random.Random(tp)
    shared = [rng.randrange(131) for _ in range(24)]
    prompts = [
        (shared if number % 3 else []) + [rng.randrange(131) for _ in range(rng.randint(1, 40))] for number in range(32)
    ]
    sampling = [SamplingParams(max_tokens=rng.randint(1, 24), temperature=0.0) for _ in prompts]
    config = engine_config(folder, tp, pp=pp, schedule_ahead=ahead, swap_space=2**20 if swap else 0)
    with OfflineEngine(config, spawn=True) as engine:
        requests = engine.generate(prompts, sampling)
        counters = engine.core.scheduler.counters
        assert (engine.core.scheduler.groups[0].kv.swap.num_copied_in > 0) == swap
        if swap:  # the last block of each, and what is not a whole one
            assert counters.recomputed_tokens <= counters.num_preemptions * 2 * config.block_size
        assert counters.num_preemptions > 0
        assert counters.prefix_cache_hits > 0
        assert engine.core.scheduler.groups[0].kv.pool.num_used == 0
    for request, params in zip(requests, sampling, strict=True):
        assert request.num_output_tokens == params.max_tokens
        assert_greedy(model, request)


def test_every_rank_reports_the_same_collectives_of_a_measured_step(reference: tuple[Path, torch.nn.Module]) -> None:
    with OfflineEngine(engine_config(reference[0], 2)) as engine:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=40, temperature=0.0))
        assert engine.timings
        for first, second in engine.timings:
            assert (first.rank, second.rank) == (0, 1)
            assert first.step_id == second.step_id
            assert [c.op for c in first.collectives] == [c.op for c in second.collectives]
            assert {"all_reduce"} <= {c.op for c in first.collectives}
            assert sum(first.phases.values()) <= first.seconds


def test_ranks_run_on_the_cpus_stated_and_no_others(reference: tuple[Path, torch.nn.Module]) -> None:
    cpu = max(os.sched_getaffinity(0))
    with OfflineEngine(engine_config(reference[0], 2, cpus=(cpu,), threads_per_rank=None)) as engine:
        (request,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5, temperature=0.0))
        bound = [each for each in psutil.Process().children(recursive=True) if each.cpu_affinity() == [cpu]]
        assert len(bound) == 2
    assert_greedy(reference[1], request)


def test_a_cpu_that_a_rank_may_not_use_is_named(reference: tuple[Path, torch.nn.Module]) -> None:
    config = engine_config(reference[0], 2, cpus=(0, 99_999))
    with pytest.raises(ExecutorError, match=r"cpus: a process on .* may not use 99999; there are "):
        OfflineEngine(config)


@pytest.mark.parametrize("rank", [0, 1])
def test_death_of_a_rank_is_seen_and_ends_the_others(reference: tuple[Path, torch.nn.Module], rank: int) -> None:
    config = engine_config(reference[0], 2)
    with OfflineEngine(config) as engine:
        engine.core.add("r", 0, [1, 2, 3], SamplingParams(max_tokens=100, temperature=0.0))
        for _ in range(5):
            engine.core.pump()
            engine.executor.wait(1.0)
        assert isinstance(engine.executor, ZmqExecutor)
        launcher = engine.executor._launcher
        assert isinstance(launcher, SpawnedRanks)
        pids = launcher.pids
        os.kill(pids[rank], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(ExecutorError, match=r"rank \d of tiny"):
            engine.run()
        assert time.monotonic() - killed < 2.0  # the promise of the executor, not a benchmark
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_that_does_not_exist_is_refused(reference: tuple[Path, torch.nn.Module], token: int) -> None:
    with (
        OfflineEngine(engine_config(reference[0])) as engine,
        pytest.raises(ValueError, match="prompt 1 has token ids"),
    ):
        engine.generate([[1], [2, token]], SamplingParams(max_tokens=2))


def test_ranks_end_with_their_owner(reference: tuple[Path, torch.nn.Module]) -> None:
    ranks = SpawnedRanks()
    config = engine_config(reference[0], 2)
    ranks.start([RankLaunch(config, rank, "tcp://127.0.0.1:9", b"nobody answers") for rank in range(2)])
    descriptors = [os.pidfd_open(pid) for pid in ranks.pids]
    assert ranks._server is not None
    assert ranks._server.stdin is not None
    ranks._server.stdin.close()  # as the kernel does it for an owner that was killed
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 60)[0]
        os.close(descriptor)
    ranks._server.wait()
    assert ranks.ended() is not None


def test_a_broken_checkpoint_names_its_tensor(reference: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    for file in reference[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ExecutorError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        OfflineEngine(engine_config(tmp_path, 2))


def test_a_budget_that_is_too_small_is_refused_before_loading(reference: tuple[Path, torch.nn.Module]) -> None:
    with pytest.raises(MemoryPlanError, match="--memory"):
        OfflineEngine(engine_config(reference[0], num_blocks=None, memory=300_000))
