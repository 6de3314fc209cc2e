"""A replica with data-parallel attention and experts over all its ranks, under whatever clients do to it.

Its ranks meet in two all-to-alls a layer, so that one rank that skips a step, or takes another, stops them all.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ridgewalk.engine.executor import ExecutorError
from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine
from ridgewalk.replica.spawned_ranks import SpawnedRanks
from ridgewalk.replica.zmq_executor import ZmqExecutor
from tests.model.checkpoints import make_checkpoint

NUM_SCHEDULES = 1000
LONGEST_OUTPUT = 6
STUCK_S = 60.0  # far longer than any schedule takes
CLEAR_GAP = 1e-3
"""Between the two best logits: rounding in another order of sums cannot turn them round."""


@dataclass(frozen=True)
class Known:
    """A prompt, and what the reference answers greedily."""

    prompt: list[int]
    output: list[int]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("sparse")
    return folder, make_checkpoint("qwen3-moe", folder)


@pytest.fixture(scope="module")
def known(sparse: tuple[Path, torch.nn.Module]) -> list[Known]:
    """Prompts without close decisions; half of them share a prefix."""
    rng = random.Random(3)
    shared = [rng.randrange(131) for _ in range(9)]
    found: list[Known] = []
    while len(found) < 12:
        start = shared if len(found) % 2 else []
        prompt = start + [rng.randrange(131) for _ in range(rng.randint(1, 12))]
        output = clear_output(sparse[1], prompt)
        if output is not None:
            found.append(Known(prompt, output))
    return found


def clear_output(model: torch.nn.Module, prompt: list[int]) -> list[int] | None:
    """The greedy output, or None when it hangs by a hair."""
    tokens = list(prompt)
    for _ in range(LONGEST_OUTPUT):
        with torch.inference_mode():
            best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        if float(best.values[0] - best.values[1]) < CLEAR_GAP:
            return None
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :]


def engine_config(folder: Path, **changes: object) -> EngineConfig:
    settings: dict[str, object] = {
        "model_name": "tiny",
        "placement": "DP2xEP2",
        "model_path": str(folder),
        "dtype": "float32",
        "dp": 2,
        "expert_parallel": True,
        "max_model_len": 32,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,
        "block_size": 4,
        "max_waiting": 100,
        "num_blocks": 9,  # so few that requests are preempted
        "admission": "prompt_only",
        "threads_per_rank": 1,
    }
    return EngineConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(sparse: tuple[Path, torch.nn.Module]) -> Iterator[OfflineEngine]:
    with OfflineEngine(engine_config(sparse[0])) as running:
        yield running


class Schedule:
    """One random story: requests arrive between steps, some are aborted, until nothing is left."""

    def __init__(self, seed: int, engine: OfflineEngine, known: list[Known]) -> None:
        self.rng = random.Random(seed)
        self.engine = engine
        self.known = known
        self.to_come = self.rng.choice((1, 2, 3, 5, 8))  # one: the other group idles all the time
        self.hurry = self.rng.random()
        self.aborts = self.rng.choice((0.0, 0.0, 0.1))
        self.live: list[tuple[Request, Known]] = []
        self.ends: dict[int, int] = {}  # times that each sequence ended

    def run(self) -> None:
        core = self.engine.core
        deadline = time.monotonic() + STUCK_S
        while self.to_come or core.has_work:
            assert time.monotonic() < deadline, "a rank is stuck"
            while self.to_come and (self.rng.random() < self.hurry or not core.has_work):
                self.arrive()
            for result in core.pump():
                for request in result.ended:
                    self.ends[request.seq_id] += 1
            for request, _ in self.live:
                if self.rng.random() < self.aborts and core.finish(request, FinishReason.ABORT):
                    self.ends[request.seq_id] += 1
            self.engine.executor.wait(1.0 if core.scheduler.num_in_flight else 0.0)

    def arrive(self) -> None:
        self.to_come -= 1
        chosen = self.rng.choice(self.known)
        sampling = SamplingParams(max_tokens=self.rng.randint(1, LONGEST_OUTPUT), temperature=0.0)
        request = self.engine.core.add(f"r{len(self.live)}", 0, chosen.prompt, sampling)
        self.live.append((request, chosen))
        self.ends[request.seq_id] = 0

    def check(self) -> None:
        assert set(self.ends.values()) == {1}
        for request, chosen in self.live:
            whole = request.finish_reason is FinishReason.LENGTH
            assert request.output_token_ids == chosen.output[: request.num_output_tokens]
            assert not whole or request.num_output_tokens == request.sampling.max_tokens
        for group in self.engine.core.scheduler.groups:
            assert group.kv.pool.num_used == 0
            group.kv.pool.check_integrity()


@pytest.mark.slow
def test_a_thousand_schedules_end_with_every_request_finished(engine: OfflineEngine, known: list[Known]) -> None:
    idle_group_steps = aborted = 0
    for seed in range(NUM_SCHEDULES):
        schedule = Schedule(seed, engine, known)
        schedule.run()
        schedule.check()
        groups = {request.group for request, _ in schedule.live}
        idle_group_steps += len(groups) == 1
        aborted += sum(request.finish_reason is FinishReason.ABORT for request, _ in schedule.live)
    counters = engine.core.scheduler.counters
    assert idle_group_steps > 100
    assert aborted > 100
    assert counters.num_preemptions > 10
    assert counters.prefix_cache_hits > 100


@pytest.mark.parametrize(("mesh", "rank"), [({}, 0), ({}, 1), ({"pp": 2}, 0), ({"pp": 2}, 3)])
def test_a_rank_killed_in_the_middle_of_a_run_is_named_and_all_are_cleaned_up(
    sparse: tuple[Path, torch.nn.Module], mesh: dict[str, int], rank: int
) -> None:
    with OfflineEngine(engine_config(sparse[0], **mesh)) as engine:
        assert isinstance(engine.executor, ZmqExecutor)
        launcher = engine.executor._launcher
        assert isinstance(launcher, SpawnedRanks)
        pids = launcher.pids
        for number in range(8):
            engine.core.add(str(number), 0, [number] * 3, SamplingParams(max_tokens=20, temperature=0.0))
        for _ in range(20):
            engine.core.pump()
            engine.executor.wait(1.0)
        assert engine.core.scheduler.num_in_flight > 0
        os.kill(pids[rank], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(ExecutorError, match=rf"rank {rank} (died|of tiny ended)"):
            engine.run()
        assert time.monotonic() - killed < 5.0  # the promise of the executor, not a benchmark
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
