"""The executor over meshes of many ranks: their outputs come in any order, steps come out whole and in order."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.executor import ExecutorError
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import GroupOutput, RankTimings
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.output_assembler import OutputAssembler
from ridgewalk.replica.zmq_executor import ZmqExecutor
from tests.engine.fake_ranks import next_token
from tests.replica.fake_rank_threads import FakeRankThreads
from tests.small_configs import SMALL_MOE

SPEC = ModelSpec.from_config(SMALL_MOE)


def engine_config(**mesh: object) -> EngineConfig:
    return EngineConfig(
        model_name="fake",
        placement="fake",
        model_path="",
        dtype="float32",
        max_model_len=48,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        block_size=4,
        max_waiting=100,
        num_blocks=24,
        threads_per_rank=1,
        **mesh,  # type: ignore[arg-type]
    )


@pytest.fixture
def launcher() -> Iterator[FakeRankThreads]:
    threads = FakeRankThreads()
    yield threads
    threads.stop()


def run(core: EngineCore) -> list[list[RankTimings]]:
    """Until nothing is left to do; what was measured."""
    measured = []
    while core.has_work:
        core.pump()
        measured += core.executor.take_timings()
        core.executor.wait(1.0)
    return measured


def expected_output(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "mesh",
    [
        {"tp": 2},
        {"dp": 2, "expert_parallel": True},
        {"dp": 4, "expert_parallel": True},
        {"pp": 2},
        {"pp": 4, "tp": 2},
        {"pp": 2, "dp": 2, "tp": 2, "expert_parallel": True},
    ],
)
def test_an_engine_over_any_mesh_gives_every_request_its_tokens(
    mesh: dict[str, object], launcher: FakeRankThreads
) -> None:
    config = engine_config(**mesh)
    executor = ZmqExecutor(config, SPEC, launcher)
    core = EngineCore(config.scheduler_config(executor.memory_plan), executor, time.monotonic)
    prompts = [[number % 3] * (1 + number % 9) for number in range(24)]
    requests = [
        core.add(str(number), 0, prompt, SamplingParams(max_tokens=12)) for number, prompt in enumerate(prompts)
    ]
    measured = run(core)
    executor.close()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.output_token_ids == expected_output(prompt, 12)
    assert [ranks[0].step_id for ranks in measured] == sorted(ranks[0].step_id for ranks in measured)
    for ranks in measured:
        assert [timings.rank for timings in ranks] == list(range(config.world_size))
        assert len({timings.step_id for timings in ranks}) == 1


def test_all_ranks_are_told_to_meet_at_the_first(launcher: FakeRankThreads) -> None:
    executor = ZmqExecutor(engine_config(pp=2, tp=2), SPEC, launcher)
    assert {rank.begin for rank in launcher.ranks} == {launcher.ranks[0].begin}
    begin = launcher.ranks[0].begin
    assert begin is not None
    assert (begin.init_method, begin.num_blocks) == ("tcp://127.0.0.1:1000", 24)
    executor.close()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_last_word_of_any_rank_ends_the_engine(rank: int, launcher: FakeRankThreads) -> None:
    config = engine_config(dp=2, tp=2, expert_parallel=True)
    executor = ZmqExecutor(config, SPEC, launcher)
    core = EngineCore(config.scheduler_config(executor.memory_plan), executor, time.monotonic)
    launcher.ranks[rank].fail_at = 3
    core.add("r", 0, [1, 2, 3], SamplingParams(max_tokens=20))
    with pytest.raises(ExecutorError, match=f"rank {rank} fell over"):
        run(core)
    executor.close()


def test_a_step_is_whole_when_its_last_group_is_and_comes_after_those_before_it() -> None:
    assembler = OutputAssembler(2)
    parts = {(step, group): GroupOutput([10 * step + group]) for step in range(3) for group in range(2)}
    for step in range(3):
        assembler.expect(step)
    for step, group in ((0, 1), (1, 1), (1, 0), (2, 0)):
        assembler.add(step, group, parts[step, group])
    assert assembler.take() == []
    assembler.add(0, 0, parts[0, 0])
    outputs = assembler.take()
    assert [output.step_id for output in outputs] == [0, 1]
    assert [[group.token_ids for group in output.groups] for output in outputs] == [[[0], [1]], [[10], [11]]]
    assembler.add(2, 1, parts[2, 1])
    assert [output.step_id for output in assembler.take()] == [2]


@pytest.mark.parametrize(("step", "group"), [(1, 0), (0, 2), (0, -1), (0, 0)])
def test_an_output_that_nobody_waits_for_is_an_error(step: int, group: int) -> None:
    assembler = OutputAssembler(2)
    assembler.expect(0)
    assembler.add(0, 0, GroupOutput([]))
    with pytest.raises(RuntimeError, match=f"group {group} sent an output of step {step}"):
        assembler.add(step, group, GroupOutput([]))


@pytest.mark.parametrize("fp8_ranks", [(), (0,), (0, 1)])
def test_fp8_is_kept_when_every_rank_multiplies_it(fp8_ranks: tuple[int, ...]) -> None:
    quantized = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    spec = ModelSpec.from_config({**SMALL_MOE, "quantization_config": quantized})
    threads, kept = FakeRankThreads(fp8_ranks), len(fp8_ranks) == 2
    executor = ZmqExecutor(engine_config(tp=2), spec, threads)
    try:
        assert [rank.begin.keeps_fp8 for rank in threads.ranks if rank.begin] == [kept, kept]
        assert executor.memory_plan.weight_bytes == spec.weight_bytes_per_rank(Mesh(tp=2), "float32", keeps_fp8=kept)
    finally:
        executor.close()
