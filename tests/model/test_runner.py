"""ModelRunner beyond equality: measuring, empty batches, warm-up, placeholders, contradictions."""

from __future__ import annotations

import pytest

from ridgewalk.engine.step import NO_TOKEN, PLACEHOLDER_TOKEN, GroupBatch, NewSequence, StepInput
from ridgewalk.model.runner import create_runner
from ridgewalk.model.sequence_table import StepError
from ridgewalk.placement.model_spec import UnsupportedModelError
from tests.model.driver import GREEDY, Driver, RunnerGroup, Sequence, make_config

EMPTY = GroupBatch([], [], [], [], [], [], [], [])


@pytest.fixture
def runner(checkpoint):
    runner = create_runner(make_config(checkpoint("qwen3").folder))
    runner.load()
    runner.allocate(40)
    return runner


def new_sequence(seq_id=1, tokens=(1, 2, 3)):
    return NewSequence(seq_id, list(tokens), len(tokens), GREEDY)


def test_empty_batch_gives_an_empty_output(runner):
    output = runner.execute(StepInput(4, [EMPTY], measure=True))
    assert output.step_id == 4
    assert output.groups[0].token_ids == []
    assert runner.timings().collectives == []


def test_measured_step_reports_phases_that_add_up(runner):
    driver = Driver(runner.execute, 40)
    sequence = driver.generate([5, 6, 7], 2)
    assert runner.timings() is None
    driver.measure = True
    driver.step([sequence])
    timings = runner.timings()
    assert set(timings.phases) == {"prepare", "embed", "attention", "mlp", "head", "sample"}
    assert sum(timings.phases.values()) == pytest.approx(timings.seconds)


def test_measured_collectives_come_in_the_same_order_on_every_rank(checkpoint, tmp_path):
    group = RunnerGroup(make_config(checkpoint("qwen3").folder, 2, tmp_path / "meet"), 40)
    driver = Driver(group.execute, 40)
    driver.measure = True
    driver.step([Sequence(0, [1, 2, 3], 3)])
    first, second = (runner.timings() for runner in group.runners)
    assert [c.op for c in first.collectives] == ["all_reduce"] * 5 + ["gather"]
    assert [c.op for c in first.collectives] == [c.op for c in second.collectives]
    assert first.collectives[0].num_bytes == 3 * 64 * 4
    assert first.phases["collective"] == pytest.approx(sum(c.seconds for c in first.collectives))
    assert (first.rank, second.rank) == (0, 1)
    group.close()


def test_warm_up_leaves_nothing_behind(runner):
    driver = Driver(runner.execute, 40)
    cold = driver.generate([9, 8, 7, 6, 5], 6)
    driver.drop(cold)
    driver.step([])
    runner.warm_up()
    assert Driver(runner.execute, 40).generate([9, 8, 7, 6, 5], 6).output == cold.output


def test_placeholder_stands_for_the_token_sampled_last(runner):
    plain = Driver(runner.execute, 40).generate([3, 1, 4], 8).output
    runner.execute(StepInput(0, [GroupBatch([], [], [], [], [], [], [], [1_000_000])]))
    assert Driver(runner.execute, 40, placeholders=True).generate([3, 1, 4], 8).output == plain


def test_rows_that_do_not_sample_say_so(runner):
    batch = GroupBatch([1], [0], [2], [[0]], [NO_TOKEN], [False], [new_sequence()], [])
    assert runner.execute(StepInput(0, [batch])).groups[0].token_ids == [NO_TOKEN]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (GroupBatch([8], [0], [1], [[0]], [NO_TOKEN], [True], [], []), "sequence 8 was scheduled but never created"),
        (GroupBatch([1], [0], [4], [[0]], [NO_TOKEN], [True], [new_sequence()], []), "exceed the tokens"),
        (GroupBatch([1], [0], [3], [[]], [NO_TOKEN], [True], [new_sequence()], []), "past the end of their block"),
        (GroupBatch([1], [0], [4], [[0]], [PLACEHOLDER_TOKEN], [True], [new_sequence()], []), "never sampled"),
        (GroupBatch([1], [0], [3], [[0]], [NO_TOKEN], [True], [new_sequence(), new_sequence()], []), "twice"),
    ],
)
def test_contradictions_are_named(runner, batch, message):
    with pytest.raises(StepError, match=message):
        runner.execute(StepInput(0, [batch]))


def test_more_sequences_than_rows_grow_the_table(runner):
    driver = Driver(runner.execute, 40)
    sequences = [Sequence(i, [i + 1, 2, 3], 3) for i in range(9)]  # max_num_seqs is 4
    for _ in range(3):
        driver.step(sequences)
    assert sequences[0].output == Driver(runner.execute, 40).generate([1, 2, 3], 3).output


def test_mesh_that_does_not_fit_is_refused_before_anything_connects(checkpoint):
    with pytest.raises(UnsupportedModelError, match="3 does not divide"):
        create_runner(make_config(checkpoint("qwen3").folder, tp=3))
