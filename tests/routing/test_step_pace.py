"""Learning how long steps take."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.engine.step import GroupBatch, StepInput
from ridgewalk.engine.step_meter import StepMeans, StepMeter
from ridgewalk.routing.step_pace import MIN_STEPS, PaceEstimate, StepPace


def learn(pace: StepPace, seed: int, noise: float = 0.0, steps: int = 400) -> PaceEstimate:
    rng, estimate = random.Random(seed), PaceEstimate()
    for _ in range(steps):
        sequences = rng.randrange(1, 200)
        blocks, prefill = sequences * rng.randrange(1, 100), rng.choice([0, 0, 0, 500])
        seconds = pace.step_s(sequences, blocks) + pace.prefill_token_s * prefill
        estimate.observe(StepMeans(1, seconds * rng.lognormvariate(0, noise), sequences, blocks, prefill))
    return estimate


def test_the_terms_are_found() -> None:
    true = StepPace(0.016, 5e-5, 8e-7, 1e-4)
    found = learn(true, 0, noise=0.1).pace()
    assert found is not None
    for sequences, blocks in ((1, 10), (100, 1000), (200, 15_000)):
        assert found.step_s(sequences, blocks) == pytest.approx(true.step_s(sequences, blocks), rel=0.05)
    assert found.prefill_token_s == pytest.approx(1e-4, rel=0.1)


def test_one_step_that_was_held_up_says_no_more_than_any_other() -> None:
    estimate = learn(StepPace(0.016, 5e-5, 8e-7, 1e-4), 0)
    before = estimate.pace()
    estimate.observe(StepMeans(1, 30.0, 100, 1000, 0))
    after = estimate.pace()
    assert before is not None
    assert after is not None
    assert after.step_s(100, 1000) == pytest.approx(before.step_s(100, 1000), rel=0.02)


@given(st.lists(st.tuples(st.floats(1e-4, 1), *[st.integers(0, 300)] * 3), min_size=MIN_STEPS, max_size=40))
def test_no_term_is_below_zero(steps: list[tuple[float, int, int, int]]) -> None:
    estimate = PaceEstimate()
    for number, step in enumerate(steps):
        assert (estimate.pace() is None) == (number < MIN_STEPS)
        estimate.observe(StepMeans(1, *step))
    pace = estimate.pace()
    assert pace is not None
    assert min(pace.base_s, pace.sequence_s, pace.block_s, pace.prefill_token_s, *pace.bends_s) >= 0


def test_from_where_computing_takes_longer_than_reading_each_sequence_costs_its_full_share() -> None:
    def true_s(sequences: float) -> float:
        return max(0.008, 0.0018 * sequences)  # the roofline: level up to 4.4 sequences

    rng, estimate = random.Random(0), PaceEstimate()
    for _ in range(600):
        sequences = rng.randrange(1, 13)
        estimate.observe(StepMeans(1, true_s(sequences) * rng.lognormvariate(0, 0.1), sequences, 10, 0))
    pace = estimate.pace()
    assert pace is not None
    for sequences in range(1, 13):
        assert pace.step_s(sequences, 10) == pytest.approx(true_s(sequences), rel=0.1)
    assert pace.more_s(1, 1) < 3e-4
    assert pace.more_s(8, 2) == pytest.approx(0.0018, rel=0.15)
    assert pace.step_s(40, 10) == pytest.approx(true_s(40), rel=0.3)  # as busy it never was


def test_one_slow_step_just_beyond_what_was_seen_before_bends_nothing() -> None:
    true, rng, estimate = StepPace(0.016, 2e-5, 8e-7, 1e-4), random.Random(0), PaceEstimate()
    for _ in range(300):
        sequences = rng.randrange(1, 16)
        seconds = true.step_s(sequences, 10 * sequences) * rng.lognormvariate(0, 0.05)
        estimate.observe(StepMeans(1, seconds, sequences, 10 * sequences, 0))
    estimate.observe(StepMeans(1, 0.3, 17, 170, 0))
    pace = estimate.pace()
    assert pace is not None
    assert pace.step_s(40, 400) < 1.5 * true.step_s(40, 400)


def test_means_of_steps_are_as_good_as_each_by_itself() -> None:
    single, averaged, meter = PaceEstimate(), PaceEstimate(), StepMeter(16)
    for sequences in range(1, 101):
        means = StepMeans(1, 0.01 + sequences * 1e-4, sequences, 10 * sequences, 0)
        single.observe(means)
        meter.add(means)
        if sequences % 10 == 0:
            taken = meter.take()
            assert taken is not None
            assert taken.steps == 10
            averaged.observe(taken)
    assert meter.take() is None
    first, second = single.pace(), averaged.pace()
    assert first is not None
    assert second is not None
    assert first.step_s(20, 200) == pytest.approx(0.012, rel=1e-3)
    assert second.step_s(20, 200) == pytest.approx(0.012, rel=1e-3)


def test_what_never_varied_is_taken_for_the_base() -> None:
    estimate = PaceEstimate()
    estimate.observe(StepMeans(100, 0.02, 4, 80, 0))
    pace = estimate.pace()
    assert pace is not None
    assert pace.base_s == pytest.approx(0.02, rel=0.01)


def test_a_step_is_metered_by_what_it_computes() -> None:
    meter = StepMeter(16)
    batch = GroupBatch([1, 2, 3], [320, 160, 0], [1, 1, 500], [[]] * 3, [0, 0, 0], [True, True, False], [], [])
    meter.observe(StepInput(0, [batch, GroupBatch([], [], [], [], [], [], [], [])]), 0.5)
    assert meter.take() == StepMeans(1, 0.5, 3, 30, 500)
    meter.observe(StepInput(1, [batch]), 0.5, rounds=2)
    assert meter.take() == StepMeans(1, 1.0, 6, 60, 1000)
