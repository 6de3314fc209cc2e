"""The sampler: which tokens can be drawn, how often, and that a draw depends on its own row alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.kernels.build import load_library
from ridgewalk.kernels.cpu_kernels import CpuKernels
from ridgewalk.kernels.kernel_set import DrawRules
from ridgewalk.kernels.torch_kernels import TorchKernels
from ridgewalk.model.penalties import TokenCounts, edit_logits
from ridgewalk.model.randomness import uniforms
from ridgewalk.model.sampler import SampleRow, sample

QUICK = settings(max_examples=80, deadline=None)


@pytest.fixture(scope="module", params=["torch", "cpu"])
def kernels(request):
    return TorchKernels() if request.param == "torch" else CpuKernels(load_library(), 2)


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **fields})


def draw(kernels, logits: torch.Tensor, sampling: SamplingParams, count: int) -> np.ndarray:
    """``count`` tokens at as many positions of one row of logits."""
    rows = [SampleRow(sampling, position, 0) for position in range(count)]
    return sample(logits.repeat(count, 1), rows, kernels)[0].numpy()


def warped(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Probabilities by transformers' own warpers."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p > 0.0:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores[0].softmax(dim=-1)


@QUICK
@given(
    vocab=st.sampled_from([7, 130, 3000]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 40, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_only_tokens_that_transformers_would_keep_are_drawn(kernels, vocab, temperature, top_k, top_p, min_p, seed):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 2
    sampling = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    probabilities = warped(logits, sampling)
    drawn = draw(kernels, logits, sampling, 200)
    assert (probabilities[drawn] > 0).all()
    likely = probabilities > 0.1  # missed by 200 draws with a chance of 7e-10
    assert set(likely.nonzero().flatten().tolist()) <= set(drawn.tolist())


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9, "temperature": 1.7}]
)
def test_frequencies_are_the_probabilities(kernels, fields):
    logits = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 1.5
    sampling = params(**{"temperature": 1.0, "seed": 99, **fields})
    count = 20_000
    observed = np.bincount(draw(kernels, logits, sampling, count), minlength=400)
    expected = warped(logits, sampling).double().numpy() * count
    kept = expected > 5
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum()
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_uniforms_are_uniform_and_uncorrelated():
    grid = uniforms(np.repeat(np.arange(200), 200), np.tile(np.arange(200), 200)).reshape(200, 200)
    assert grid.min() >= 0.0
    assert grid.max() < 1.0
    assert abs(grid.mean() - 0.5) < 0.006
    assert abs(grid.var() - 1 / 12) < 0.003
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert len(np.unique(grid)) == grid.size


def test_uniforms_never_change():
    """Streams resumed on another version must go on with the same draws."""
    numbers = uniforms(np.array([0, 1, 2**63 - 1]), np.array([0, 7, 100_000]))
    assert numbers.tolist() == [0.6524484863740322, 0.24696520214533768, 0.2781543965468831]


@QUICK
@given(
    mix=st.lists(
        st.sampled_from(
            [
                {"temperature": 0.0},
                {"temperature": 0.8},
                {"temperature": 1.0, "top_k": 3},
                {"temperature": 1.3, "top_p": 0.7},
                {"temperature": 1.0, "min_p": 0.1, "top_k": 70},
                {"temperature": 1.0, "presence_penalty": 1.0, "logprobs": 2},
            ]
        ),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 2**31),
)
def test_a_row_does_not_notice_the_others(kernels, mix, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(mix), 2000, generator=generator).to(torch.bfloat16)  # BF16 has many equal logits
    rows = []
    for index, fields in enumerate(mix):
        sampling = params(seed=seed + index, **fields)
        counts = TokenCounts(2000) if "presence_penalty" in fields else None
        if counts:
            counts.update(np.arange(20), 10)
        rows.append(SampleRow(sampling, 17 + index, 5, counts))
    together = sample(logits, rows, kernels)[0].tolist()
    alone = [sample(logits[index : index + 1], [row], kernels)[0].item() for index, row in enumerate(rows)]
    assert together == alone


def test_logits_are_left_alone(kernels):
    logits = torch.randn(2, 50)
    before = logits.clone()
    rows = [SampleRow(params(temperature=0.5, logit_bias=((3, 9.0),), logprobs=1), 3, 0)] * 2
    sample(logits, rows, kernels)
    assert torch.equal(logits, before)


def test_repetition_penalty_equals_transformers():
    logits = torch.randn(1, 60)
    tokens = torch.randint(0, 60, (1, 25))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(tokens, logits.clone())
    counts = TokenCounts(60)
    counts.update(tokens[0, :10].numpy(), 5)
    counts.update(tokens[0].numpy(), 5)
    actual = logits[0].clone()
    edit_logits(actual, params(repetition_penalty=1.7), 20, counts)
    torch.testing.assert_close(actual, expected[0])


@QUICK
@given(prompt=st.lists(st.integers(0, 9), min_size=1), output=st.lists(st.integers(0, 9)), cut=st.integers(0, 20))
def test_presence_and_frequency_count_the_output_only(prompt, output, cut):
    tokens = np.array(prompt + output, dtype=np.int32)
    counts = TokenCounts(10)
    counts.update(tokens[:cut], len(prompt))  # may end within the prompt
    counts.update(tokens, len(prompt))
    logits = torch.zeros(10)
    edit_logits(logits, params(presence_penalty=0.5, frequency_penalty=0.25), len(output), counts)
    expected = [-0.25 * output.count(token) - 0.5 * (token in output) for token in range(10)]
    assert logits.tolist() == pytest.approx(expected)


def test_bias_and_minimum_length(kernels):
    sampling = params(
        temperature=0.0, logit_bias=((2, 5.0), (4, -3.0), (999, 1.0)), min_tokens=3, stop_token_ids=(2, 77)
    )
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0, 9.0]])

    def first(num_output_tokens):
        return sample(logits, [SampleRow(sampling, 10, num_output_tokens)], kernels)[0].item()

    assert first(2) == 4  # 9 - 3
    biased = params(temperature=0.0, logit_bias=((2, 7.0),), min_tokens=3, stop_token_ids=(2, 4))
    assert sample(logits, [SampleRow(biased, 10, 2)], kernels)[0].item() == 1
    assert sample(logits, [SampleRow(biased, 10, 3)], kernels)[0].item() == 4


def test_logprobs_come_after_bias_and_before_temperature(kernels):
    logits = torch.tensor([[1.0, 2.0, 3.0, -torch.inf]])
    sampling = params(temperature=3.0, top_k=1, logprobs=4, logit_bias=((0, 5.0),))
    tokens, reported = sample(logits, [SampleRow(sampling, 0, 0)], kernels)
    expected = torch.log_softmax(torch.tensor([6.0, 2.0, 3.0]), dim=0).tolist()
    assert tokens.item() == 0
    assert reported[0].logprob == pytest.approx(expected[0])
    assert reported[0].rank == 1
    assert [token for token, _ in reported[0].top] == [0, 2, 1, 3]
    assert [value for _, value in reported[0].top] == pytest.approx([expected[0], expected[2], expected[1], -9999.0])


def test_logprobs_only_for_those_who_asked(kernels):
    rows = [SampleRow(params(temperature=0.0), 0, 0), SampleRow(params(temperature=0.0, logprobs=0), 0, 0)]
    tokens, reported = sample(torch.tensor([[0.0, 1.0], [3.0, 1.0]]), rows, kernels)
    assert tokens.tolist() == [1, 0]
    assert reported[0] is None
    assert reported[1].top == []
    assert sample(torch.zeros(1, 4), rows[:1], kernels)[1] is None


def test_extreme_parameters_do_not_break_the_draw(kernels):
    logits = torch.full((1, 5000), -1e4)
    logits[0, 4321] = 50.0
    for fields in ({"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-9, "top_k": 4000}):
        sampling = params(**{"temperature": 1.0, **fields})
        assert sample(logits, [SampleRow(sampling, 5, 0)], kernels)[0].item() == 4321


@settings(max_examples=150, deadline=None)
@given(
    vocab=st.sampled_from([1, 5, 129, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.0, 0.3, 3.0]),
    top_k=st.integers(0, 200),
    top_p=st.floats(0.0, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.sampled_from([0.0, 0.01, 1.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_cpu_kernel_draws_what_the_reference_draws(vocab, dtype, scale, top_k, top_p, min_p, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(20, vocab + 3, generator=generator) * scale).to(dtype)[:, :vocab]
    logits[:, ::7] = -torch.inf
    logits[:, 0] = 0.5
    count = len(logits)
    rules = DrawRules(
        torch.full((count,), temperature),
        torch.full((count,), top_k),
        torch.full((count,), top_p, dtype=torch.float64),
        torch.full((count,), min_p, dtype=torch.float64),
        torch.rand(count, generator=generator, dtype=torch.float64),
    )
    ours, theirs = CpuKernels(load_library(), 1).draw(logits, rules), TorchKernels().draw(logits, rules)
    # A draw within a rounding error of a boundary, or a cut within one, may fall to either side.
    assert (ours == theirs).sum() >= count - 1 or scale == 0.0
    assert (logits.gather(1, ours[:, None]) > -torch.inf).all()
