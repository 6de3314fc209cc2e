"""The ModelRunner beyond equality: measuring, empty batches, warm-up, placeholders, contradictions."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ridgewalk.engine.step import NO_TOKEN, PLACEHOLDER_TOKEN, BlockCopy, GroupBatch, NewSequence, StepInput
from ridgewalk.kernels.block_scales import block_linear
from ridgewalk.kernels.cuda_fp8 import scaled_linear
from ridgewalk.model import decoder as decoder_module
from ridgewalk.model import runner as runner_module
from ridgewalk.model.moe import MoE
from ridgewalk.model.phase_clock import PhaseClock
from ridgewalk.model.runner import create_runner, multiplies_fp8
from ridgewalk.model.sequence_table import StepError
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec, UnsupportedModelError
from tests.model.driver import GREEDY, Driver, RunnerGroup, Sequence, make_config
from tests.placement import hub_configs

EMPTY = GroupBatch([], [], [], [], [], [], [], [])
NUM_BLOCKS = 40
ONE_RANK = Mesh()


@pytest.fixture
def ranks_of(checkpoint, tmp_path):
    """Function from (family, mesh) to its running ranks."""
    groups = []

    def make(family: str, mesh: Mesh = ONE_RANK, **changes) -> RunnerGroup:
        axes = {"pp": mesh.pp, "dp": mesh.dp, "expert_parallel": mesh.expert_parallel, **changes}
        config = make_config(checkpoint(family).folder, mesh.tp, tmp_path / f"meet{len(groups)}", **axes)
        groups.append(RunnerGroup(config, NUM_BLOCKS))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


@pytest.fixture
def group(ranks_of):
    return ranks_of("qwen3")


def new_sequence(seq_id=1, tokens=(1, 2, 3)):
    return NewSequence(seq_id, list(tokens), len(tokens), GREEDY)


def test_empty_batch_gives_an_empty_output(group):
    output = group.execute(StepInput(4, [EMPTY], measure=True))
    assert output.groups[0].token_ids == []
    assert group.runners[0].timings().collectives == []


@pytest.mark.parametrize(
    ("family", "phases"),
    [
        ("qwen3", {"mlp"}),
        ("mixtral", {"router", "experts"}),
        ("deepseek-v3", {"mlp", "router", "experts"}),
    ],
)
def test_measured_step_reports_phases_that_add_up(ranks_of, family, phases):
    group = ranks_of(family)
    driver = Driver(group, NUM_BLOCKS)
    sequence = driver.generate([5, 6, 7], 2)
    runner = group.runners[0]
    assert runner.timings() is None
    driver.measure = True
    driver.step([sequence])
    timings = runner.timings()
    assert phases | {"prepare", "embed", "attention", "head", "sample"} <= set(timings.phases)
    assert sum(timings.phases.values()) == pytest.approx(timings.seconds)
    assert all(seconds >= 0 for seconds in timings.phases.values())


def test_measured_collectives_come_in_the_same_order_on_every_rank(ranks_of):
    group = ranks_of("qwen3", Mesh(tp=2))
    driver = Driver(group, NUM_BLOCKS)
    driver.measure = True
    driver.step([Sequence(0, [1, 2, 3], 3)])
    first, second = (runner.timings() for runner in group.runners)
    assert [c.op for c in first.collectives] == ["all_reduce"] * 5 + ["gather"]
    assert [c.op for c in first.collectives] == [c.op for c in second.collectives]
    assert first.collectives[0].num_bytes == 3 * 64 * 4
    assert first.phases["collective"] == pytest.approx(sum(c.seconds for c in first.collectives))
    assert (first.rank, second.rank) == (0, 1)


def test_measured_stages_report_transfers_and_bubbles(ranks_of):
    group = ranks_of("llama-4-layers", Mesh(pp=2))
    driver = Driver(group, NUM_BLOCKS)
    sequence = driver.generate([5, 6, 7], 3)
    driver.measure = True
    driver.step([sequence])
    first, last = (runner.timings() for runner in group.runners)
    assert [(c.op, c.group, c.num_bytes) for c in first.collectives] == [("send", "pp", 64 * 4)]
    assert [(c.op, c.group, c.num_bytes) for c in last.collectives] == [("recv", "pp", 64 * 4)]
    assert first.bubble_seconds == 0.0  # one step at a time: without work it is idle
    assert last.bubble_seconds >= last.phases.get("bubble", 0.0)  # since the last report: the unmeasured steps too
    for timings in (first, last):
        assert sum(timings.phases.values()) == pytest.approx(timings.seconds)
    driver.step([sequence])
    again = group.runners[1].timings()
    assert again.bubble_seconds == pytest.approx(again.phases.get("bubble", 0.0))


def test_collectives_and_waits_for_a_stage_are_taken_out_of_the_phase_around_them():
    groups = SimpleNamespace(seconds=0.0, previous=SimpleNamespace(bubble_seconds=7.0))
    clock = PhaseClock(groups, torch.device("cpu"))
    clock.start()
    groups.seconds, groups.previous.bubble_seconds = 100.0, 1007.0
    clock.mark("embed")
    groups.seconds = 150.0
    clock.mark("attention")
    seconds = clock.stop()
    clock.mark("mlp")  # after the end
    assert clock.phases["collective"] == pytest.approx(150.0)
    assert clock.phases["bubble"] == pytest.approx(1000.0)
    assert clock.phases["embed"] < -1000.0
    assert clock.phases.keys() == {"collective", "bubble", "embed", "attention"}
    assert seconds == pytest.approx(sum(clock.phases.values()))
    assert 0.0 < seconds < 1000.0  # what really passed: nothing is counted twice


def test_first_stage_waiting_beside_open_steps_is_a_bubble(ranks_of):
    group = ranks_of("llama-4-layers", Mesh(pp=2))
    driver = Driver(group, NUM_BLOCKS)
    sequences = [Sequence(i, [i + 1, 2, 3], 3) for i in range(2)]
    driver.measure = True
    for _ in range(2):
        opened = [driver.begin([sequence]) for sequence in sequences]
        for step in opened:
            driver.end(step)
    assert group.runners[0].timings().bubble_seconds > 0.0


def test_expert_parallel_ranks_report_their_load(ranks_of, checkpoint):
    group = ranks_of("mixtral", Mesh(dp=2, expert_parallel=True))
    driver = Driver(group, NUM_BLOCKS)
    driver.measure = True
    driver.step([Sequence(0, list(range(1, 12)), 11)])  # the second group is idle, but computes for the first
    first, second = (runner.timings() for runner in group.runners)
    num_layers, top_k = 4, 2
    for layer in range(num_layers):
        assert sum(first.expert_tokens[layer]) + sum(second.expert_tokens[layer]) == 11 * top_k
        assert len(first.expert_tokens[layer]) == len(second.expert_tokens[layer]) == 4
    assert second.routed_tokens == second.routed_bytes == 0
    assert first.routed_tokens == sum(map(sum, second.expert_tokens))
    assert first.routed_bytes >= first.routed_tokens * 64 * 4
    for timings in (first, second):
        assert [(c.op, c.group) for c in timings.collectives] == [("dispatch", "ep"), ("combine", "ep")] * num_layers
        assert sum(timings.phases.values()) == pytest.approx(timings.seconds)
    driver.step([])
    assert [runner.timings().routed_tokens for runner in group.runners] == [0, 0]


MESHES = [
    ("qwen3", ONE_RANK),
    ("qwen3", Mesh(pp=2, tp=2)),
    ("deepseek-v3", Mesh(tp=2, expert_parallel=True)),
    ("deepseek-v3", Mesh(dp=2, pp=2, expert_parallel=True)),
]


@pytest.mark.parametrize(("family", "mesh"), MESHES, ids=lambda value: getattr(value, "name", value))
def test_warm_up_leaves_nothing_behind(ranks_of, family, mesh):
    group = ranks_of(family, mesh)
    driver = Driver(group, NUM_BLOCKS)
    cold = driver.generate([9, 8, 7, 6, 5], 6, group=mesh.dp - 1)
    driver.drop(cold)
    driver.step([])
    group.on_every_rank("warm_up")
    assert Driver(group, NUM_BLOCKS).generate([9, 8, 7, 6, 5], 6, group=mesh.dp - 1).output == cold.output


def test_warm_up_is_counted_as_nobody_s_traffic(ranks_of):
    group = ranks_of("deepseek-v3", Mesh(dp=2, pp=2, expert_parallel=True))
    group.on_every_rank("warm_up")
    group.execute(StepInput(4, [EMPTY, EMPTY], measure=True))
    timings = [runner.timings() for runner in group.runners]
    assert [(t.routed_tokens, t.routed_bytes, t.bubble_seconds) for t in timings] == [(0, 0, 0.0)] * 4


class WatchedKernels:
    """Kernels that want at least one token in every call."""

    def __init__(self, kernels) -> None:
        self.unwatched = kernels

    def __getattr__(self, name):
        found = getattr(self.unwatched, name)
        if not callable(found):
            return found

        def call(*arguments, **options):
            for argument in (*arguments, *options.values()):
                assert not isinstance(argument, torch.Tensor) or argument.numel() > 0, f"{name} without tokens"
            return found(*arguments, **options)

        return call


class AnyRowsMoE(MoE):
    """Any number of rows may arrive at an expert, none included: in these layers kernels are not watched."""

    def __init__(self, spec, parameters, kernels, *rest) -> None:
        super().__init__(spec, parameters, kernels.unwatched, *rest)


@pytest.mark.parametrize(
    ("family", "mesh"),
    [*MESHES, ("deepseek-v2", Mesh(dp=2, tp=2, expert_parallel=True))],
    ids=lambda value: getattr(value, "name", value),
)
def test_no_kernel_runs_without_tokens(ranks_of, monkeypatch, family, mesh):
    select = runner_module.select_kernels
    monkeypatch.setattr(runner_module, "select_kernels", lambda *arguments: WatchedKernels(select(*arguments)))
    monkeypatch.setattr(decoder_module, "MoE", AnyRowsMoE)
    driver = Driver(ranks_of(family, mesh), NUM_BLOCKS)
    sequence = Sequence(0, list(range(1, 9)), 8)
    driver.step([sequence], chunk=1)  # nothing to sample, one token for all tp ranks, other groups idle
    driver.step([])
    while len(sequence.output) < 3:
        driver.step([sequence], chunk=3)


def test_placeholder_stands_for_the_token_sampled_last(ranks_of):
    group = ranks_of("deepseek-v3", Mesh(dp=2, tp=2, expert_parallel=True), tokens_broadcast=True)
    driver = Driver(group, NUM_BLOCKS)
    plain = driver.generate([3, 1, 4], 8, group=1)
    driver.drop(plain)
    driver.step([])
    placed = Driver(group, NUM_BLOCKS, placeholders=True)
    assert placed.generate([3, 1, 4], 8, group=1).output == plain.output


def test_rows_that_do_not_sample_say_so(group):
    batch = GroupBatch([1], [0], [2], [[0]], [NO_TOKEN], [False], [new_sequence()], [])
    assert group.execute(StepInput(0, [batch])).groups[0].token_ids == [NO_TOKEN]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (GroupBatch([8], [0], [1], [[0]], [NO_TOKEN], [True], [], []), "sequence 8 was scheduled but never created"),
        (GroupBatch([1], [0], [4], [[0]], [NO_TOKEN], [True], [new_sequence()], []), "exceed the tokens"),
        (GroupBatch([1], [0], [3], [[]], [NO_TOKEN], [True], [new_sequence()], []), "past the end of their block"),
        (GroupBatch([1], [0], [4], [[0]], [PLACEHOLDER_TOKEN], [True], [new_sequence()], []), "never sampled"),
        (GroupBatch([1], [0], [3], [[0]], [NO_TOKEN], [True], [new_sequence(), new_sequence()], []), "twice"),
        (GroupBatch([], [], [], [], [], [], [], [], [BlockCopy(True, 0, 0)]), "given no swap space"),
    ],
)
def test_contradictions_are_named(group, batch, message):
    with pytest.raises(StepError, match=message):
        group.execute(StepInput(0, [batch]))


def test_more_sequences_than_rows_grow_the_table(group):
    driver = Driver(group, NUM_BLOCKS)
    sequences = [Sequence(i, [i + 1, 2, 3], 3) for i in range(9)]  # max_num_seqs is 4
    for _ in range(3):
        driver.step(sequences)
    for sequence in sequences:
        driver.drop(sequence)
    driver.step([])
    assert sequences[0].output == driver.generate([1, 2, 3], 3).output


def test_mesh_that_does_not_fit_is_refused_before_anything_connects(checkpoint):
    with pytest.raises(UnsupportedModelError, match="3 does not divide"):
        create_runner(make_config(checkpoint("qwen3").folder, tp=3))


@pytest.mark.parametrize("product", [scaled_linear, block_linear])
def test_fp8_is_kept_where_a_product_for_its_blocks_works(monkeypatch, product):
    """A device that could only dequantize in every step does it once, on the way in."""
    spec = dataclasses.replace(ModelSpec.from_config(hub_configs.QWEN3_0_6B), fp8_block=(128, 128))
    monkeypatch.setattr(runner_module, "probe_fp8_linear", lambda block, dtype, device: product)
    assert multiplies_fp8("cuda", spec, "bfloat16") is (product is scaled_linear)
    assert not multiplies_fp8("cpu", spec, "bfloat16")
    assert not multiplies_fp8("cuda", dataclasses.replace(spec, fp8_block=None), "bfloat16")
