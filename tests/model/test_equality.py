"""Token by token, the runner says what transformers says: every family, every tp, however steps are cut."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from ridgewalk.engine.sampling import SamplingParams
from tests.model.checkpoints import FAMILIES
from tests.model.driver import BLOCK_SIZE, GREEDY, Driver, RunnerGroup, Sequence, make_config

NUM_BLOCKS = 400
GAP = 1e-4  # two best logits closer than this may swap places in another order of summation


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + length).randrange(131) for _ in range(length)]


def assert_greedy(checkpoint, sequence: Sequence) -> None:
    """Every output token is the reference's, given what came before it."""
    logits = checkpoint.logits(sequence.token_ids)
    assert logits.std() >= 1.0
    for position in range(sequence.num_prompt_tokens, len(sequence.token_ids)):
        best = logits[position - 1].topk(2)
        token = sequence.token_ids[position]
        close = float(best.values[0] - best.values[1]) < GAP
        assert token == best.indices[0] or (close and token == best.indices[1]), f"at position {position}"


@pytest.fixture(params=[1, 2, 4])
def tp(request):
    return request.param


@pytest.fixture
def start(checkpoint, tmp_path):
    """Function from (family, tp) to a driver of a running group."""
    groups = []

    def make(family: str, tp: int, placeholders: bool = False, **changes) -> Driver:
        config = make_config(checkpoint(family).folder, tp, tmp_path / f"meet{len(groups)}", **changes)
        groups.append(RunnerGroup(config, NUM_BLOCKS))
        return Driver(groups[-1].execute, NUM_BLOCKS, placeholders)

    yield make
    for group in groups:
        group.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(checkpoint, start, family, tp):
    driver = start(family, tp)
    for length in (1, 37):
        assert_greedy(checkpoint(family), driver.generate(prompt_of(length), 20))


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_chunked_prefill_changes_nothing(checkpoint, start, tp, chunk):
    driver = start("qwen3", tp)
    assert_greedy(checkpoint("qwen3"), driver.generate(prompt_of(50), 12, chunk=chunk))


def test_prefix_cached_start(checkpoint, start, tp):
    driver = start("llama-llama3", tp)
    prompt = prompt_of(41)
    first = driver.generate(prompt, 9)
    shared = len(prompt) // BLOCK_SIZE
    tail = prompt_of(7, seed=3)
    second = Sequence(7, prompt[: shared * BLOCK_SIZE] + tail, shared * BLOCK_SIZE + len(tail), GREEDY)
    second.blocks, second.num_computed = first.blocks[:shared], shared * BLOCK_SIZE
    while len(second.output) < 12:
        driver.step([second])
    assert_greedy(checkpoint("llama-llama3"), second)


def test_preempted_sequences_continue(checkpoint, start, tp):
    driver = start("qwen2", tp)
    sequences = [Sequence(i, prompt_of(10 + i, seed=i), 10 + i) for i in range(4)]
    for step in range(30):
        if step in (7, 8, 19):
            driver.drop(sequences[step % 4])
        driver.step(sequences, chunk=9)
    for sequence in sequences:
        assert_greedy(checkpoint("qwen2"), sequence)


@pytest.mark.parametrize("placeholders", [False, True])
def test_32_interleaved_requests(checkpoint, start, tp, placeholders):
    driver = start("qwen3-yarn", tp, placeholders, tokens_broadcast=placeholders)
    rng = random.Random(5)
    waiting = [Sequence(i, prompt_of(rng.randint(1, 60), seed=i), 0) for i in range(32)]
    for sequence in waiting:
        sequence.num_prompt_tokens = len(sequence.token_ids)
    targets = {sequence.seq_id: rng.randint(1, 14) for sequence in waiting}
    done, running = [], []
    while waiting or running:
        while waiting and len(running) < 9:
            running.append(waiting.pop())
        rng.shuffle(running)
        driver.step(running[: rng.randint(1, len(running))], chunk=rng.choice([2, 7, 30]))
        for sequence in [s for s in running if len(s.output) >= targets[s.seq_id]]:
            driver.drop(sequence)
            running.remove(sequence)
            done.append(sequence)
    for sequence in done:
        assert_greedy(checkpoint("qwen3-yarn"), sequence)


def test_logprobs_equal_transformers(checkpoint, start, tp):
    driver = start("llama", tp)
    params = SamplingParams(max_tokens=99, temperature=0.7, top_p=0.9, seed=11, logprobs=5)
    sequence = driver.generate(prompt_of(20), 15, params)
    logprobs = torch.log_softmax(checkpoint("llama").logits(sequence.token_ids), dim=-1)
    for offset, reported in enumerate(sequence.logprobs):
        row = logprobs[19 + offset]
        token = sequence.output[offset]
        assert reported.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert reported.rank == int((row > row[token]).sum()) + 1
        assert [value for _, value in reported.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)


def test_draws_do_not_depend_on_tp_batch_or_preemption(checkpoint, start):
    params = SamplingParams(max_tokens=99, temperature=1.0, seed=2**62 + 5)
    prompt = prompt_of(12)
    alone = start("mistral", 1).generate(prompt, 16, params).output
    driver = start("mistral", 2)
    sequence = Sequence(0, list(prompt), len(prompt), params)
    others = [Sequence(i, prompt_of(5 + i), 5 + i, params) for i in range(1, 4)]
    while len(sequence.output) < 16:
        if len(sequence.output) == 6:
            driver.drop(sequence)
        driver.step([*others, sequence])
    assert sequence.output == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_as_close_to_fp32_as_transformers(checkpoint, start, dtype):
    params = SamplingParams(max_tokens=99, temperature=0.0, logprobs=0)
    sequence = start("qwen3", 2, dtype=dtype).generate(prompt_of(30), 40, params)
    narrow = copy.deepcopy(checkpoint("qwen3").reference).to(getattr(torch, dtype))
    with torch.inference_mode():
        theirs = narrow(torch.tensor([sequence.token_ids])).logits[0].float()
    exact, theirs = (torch.log_softmax(x, dim=-1) for x in (checkpoint("qwen3").logits(sequence.token_ids), theirs))
    rows, tokens = torch.arange(29, 69), torch.tensor(sequence.output)
    ours = torch.tensor([reported.logprob for reported in sequence.logprobs])
    error, their_error = ((x - exact[rows, tokens]).abs().mean() for x in (ours, theirs[rows, tokens]))
    assert error <= 1.5 * their_error + 1e-3


def test_without_a_compiler_the_torch_kernels_and_gloo_say_the_same(checkpoint, start, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    driver = start("qwen3", 2)
    sequences = [Sequence(i, prompt_of(3 + 11 * i), 3 + 11 * i) for i in range(3)]
    for _ in range(10):
        driver.step(sequences, chunk=8)
    for sequence in sequences:
        assert_greedy(checkpoint("qwen3"), sequence)
