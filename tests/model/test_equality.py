"""Token by token, the runner says what transformers says: every family, every mesh, however steps are cut."""

from __future__ import annotations

import copy
import random
from collections import deque

import msgspec
import pytest
import torch

from ridgewalk.engine.sampling import ReasoningBudget, SamplingParams
from ridgewalk.model.loader import load_parameters
from ridgewalk.placement.expert_map import balanced_expert_map
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from tests.model.checkpoints import DENSE, SPARSE
from tests.model.driver import BLOCK_SIZE, GREEDY, Driver, OpenStep, RunnerGroup, Sequence, make_config

NUM_BLOCKS = 400
GAP = 1e-4  # two best logits closer than this may swap places in another order of summation

MESHES = {
    "TP1": Mesh(),
    "TP2": Mesh(tp=2),
    "PP2": Mesh(pp=2),
    "PP2xTP2": Mesh(pp=2, tp=2),
}
DENSE_MESHES = {**MESHES, "PP2xTP4": Mesh(pp=2, tp=4)}
SPARSE_MESHES = {
    **MESHES,
    "TP2xEP2": Mesh(tp=2, expert_parallel=True),
    "DP2xEP2": Mesh(dp=2, expert_parallel=True),
    "DP2xPP2xEP2": Mesh(dp=2, pp=2, expert_parallel=True),
    "DP2xPP2xTP2xEP4": Mesh(dp=2, pp=2, tp=2, expert_parallel=True),
}
CASES = [
    *((family, mesh) for family in DENSE for mesh in DENSE_MESHES.values()),
    *((family, mesh) for family in SPARSE for mesh in SPARSE_MESHES.values()),
    ("llama-4-layers", Mesh(pp=4, tp=2)),
    ("mixtral", Mesh(tp=4)),
    ("deepseek-v3", Mesh(pp=4)),
    ("deepseek-v3", Mesh(dp=8, expert_parallel=True)),
    ("deepseek-v2-groups", Mesh(pp=4, dp=2, expert_parallel=True)),
]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 1000 + length)
    return [rng.randrange(131) for _ in range(length)]


def new_sequence(seq_id: int, length: int, group: int = 0, sampling: SamplingParams = GREEDY) -> Sequence:
    return Sequence(seq_id, prompt_of(length, seed=seq_id), length, sampling, group)


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
    """Function from (family, tp or mesh) to a driver of a running group."""
    groups = []

    def make(family: str, shape: int | Mesh = 1, placeholders: bool = False, **changes) -> Driver:
        mesh = Mesh(tp=shape) if isinstance(shape, int) else shape
        axes = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp, "expert_parallel": mesh.expert_parallel}
        config = make_config(checkpoint(family).folder, init=tmp_path / f"meet{len(groups)}", **{**axes, **changes})
        groups.append(RunnerGroup(config, NUM_BLOCKS))
        return Driver(groups[-1], NUM_BLOCKS, placeholders)

    yield make
    for group in groups:
        group.close()


@pytest.mark.parametrize("family", DENSE)
def test_family_equals_transformers(checkpoint, start, family, tp):
    driver = start(family, tp)
    for length in (1, 37):
        assert_greedy(checkpoint(family), driver.generate(prompt_of(length), 20))


def exercise(driver: Driver) -> list[Sequence]:
    """Chunked prefill, groups that idle in turn, a preemption, a prefix-cached start; the sequences, grown."""
    groups = range(driver.ranks.config.dp)
    long = [new_sequence(10 * group, 19, group) for group in groups]
    short = [new_sequence(10 * group + 1, 1 + 9 * (group % 2), group) for group in groups]
    driver.step(long[:1], chunk=7)  # only the first group works
    for _ in range(4):
        driver.step(long + short, chunk=7)
    driver.drop(short[-1])
    driver.step(long[-1:])  # only the last group works
    kept = long[-1].num_computed // BLOCK_SIZE
    shared, tail = long[-1].token_ids[: kept * BLOCK_SIZE], prompt_of(3, seed=99)
    cached = Sequence(500, shared + tail, len(shared + tail), group=groups[-1])
    cached.blocks, cached.num_computed = long[-1].blocks[:kept], len(shared)
    for _ in range(5):
        driver.step([cached, *long, *short], chunk=7)
    return [*long, *short, cached]


@pytest.mark.parametrize(("family", "mesh"), CASES, ids=lambda value: getattr(value, "name", value))
def test_every_mesh_equals_transformers(checkpoint, start, family, mesh):
    for sequence in exercise(start(family, mesh)):
        assert len(sequence.output) >= 3
        assert_greedy(checkpoint(family), sequence)


@pytest.mark.parametrize("family", ["deepseek-v3-fp8", "deepseek-v3-aligned-fp8"])
@pytest.mark.parametrize(
    "mesh",
    [Mesh(), Mesh(tp=2), Mesh(tp=4), Mesh(pp=2), Mesh(dp=2, expert_parallel=True), Mesh(pp=2, tp=2)],
    ids=lambda mesh: mesh.name,
)
def test_weights_kept_in_fp8_equal_transformers(checkpoint, start, monkeypatch, family, mesh):
    held: list[int] = []

    def load(*arguments):
        parameters = load_parameters(*arguments)
        held.append(sum(weight.nbytes for weight in parameters.values()))
        return parameters

    monkeypatch.setattr("ridgewalk.model.runner.load_parameters", load)
    driver = start(family, mesh, keeps_fp8=True)
    spec = ModelSpec.from_folder(checkpoint(family).folder)
    planned = spec.weight_bytes_per_stage(mesh, "float32", keeps_fp8=True)
    assert sorted(held) == sorted(planned * (mesh.tp * mesh.dp))
    assert max(held) < spec.weight_bytes_per_rank(mesh, "float32")
    for sequence in exercise(driver):
        assert len(sequence.output) >= 3
        assert_greedy(checkpoint(family), sequence)


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


@pytest.mark.parametrize(
    ("family", "mesh", "placeholders"),
    [
        *(("qwen3-yarn", Mesh(tp=tp), placeholders) for tp in (1, 2, 4) for placeholders in (False, True)),
        ("deepseek-v3", Mesh(dp=2, expert_parallel=True), True),
        ("qwen3-moe", Mesh(dp=2, pp=2, tp=2, expert_parallel=True), False),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_32_interleaved_requests(checkpoint, start, family, mesh, placeholders):
    driver = start(family, mesh, placeholders, tokens_broadcast=placeholders)
    rng = random.Random(5)
    waiting = [new_sequence(i, rng.randint(1, 60), i % mesh.dp) for i in range(32)]
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
        assert_greedy(checkpoint(family), sequence)


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


@pytest.mark.parametrize(
    ("family", "mesh"),
    [("mistral", Mesh(tp=2)), ("qwen3-moe", Mesh(dp=2, pp=2, expert_parallel=True))],
    ids=lambda value: getattr(value, "name", value),
)
def test_draws_do_not_depend_on_mesh_batch_or_preemption(checkpoint, start, family, mesh):
    params = SamplingParams(max_tokens=99, temperature=1.0, seed=2**62 + 5, presence_penalty=0.5)
    prompt = prompt_of(12)
    alone = start(family).generate(prompt, 16, params).output
    driver = start(family, mesh)
    sequence = Sequence(0, list(prompt), len(prompt), params, group=mesh.dp - 1)
    others = [new_sequence(i, 5 + i, i % mesh.dp, params) for i in range(1, 4)]
    while len(sequence.output) < 16:
        if len(sequence.output) == 6:
            driver.drop(sequence)
        driver.step([*others, sequence])
    assert sequence.output == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_thinking_ends_at_its_budget_on_any_mesh_and_after_preemption(checkpoint, start, temperature):
    closing = 130
    budget = ReasoningBudget(8, 129, closing, begins_open=True)
    params = SamplingParams(max_tokens=99, temperature=temperature, seed=5, logit_bias=((closing, -100.0),))
    params = msgspec.structs.replace(params, reasoning=budget)
    if temperature == 0.0:
        params = msgspec.structs.replace(params, logit_bias=())  # so that only arg max travels between the ranks
    prompt = prompt_of(12)
    alone = start("mistral").generate(prompt, 12, params).output
    driver = start("mistral", Mesh(tp=2))
    sequence = Sequence(0, list(prompt), len(prompt), params)
    other = new_sequence(1, 6)
    while len(sequence.output) < 12:
        if len(sequence.output) in (3, 10):
            driver.drop(sequence)
        driver.step([other, sequence])
    assert sequence.output == alone
    assert alone.index(closing) == 8 - alone[:8].count(129)
    assert closing not in alone[9:]


@pytest.mark.parametrize(
    ("family", "mesh"),
    [("llama-4-layers", Mesh(pp=4)), ("deepseek-v3", Mesh(dp=2, pp=2, expert_parallel=True))],
    ids=lambda value: getattr(value, "name", value),
)
def test_steps_in_flight_fill_the_stages(checkpoint, start, family, mesh):
    driver = start(family, mesh)
    batches = [[new_sequence(10 * i + g, 5 + 3 * i + g, g) for g in range(mesh.dp)] for i in range(mesh.pp)]
    batches[0] = batches[0][:1]  # the other group idles in every step of this batch
    opened: deque[tuple[list[Sequence], OpenStep]] = deque()
    for turn in range(9 * mesh.pp):
        if len(opened) == mesh.pp:
            driver.end(opened.popleft()[1])
        batch = batches[turn % mesh.pp]
        opened.append((batch, driver.begin(batch, chunk=4)))
    for _, step in opened:
        driver.end(step)
    for sequence in (sequence for batch in batches for sequence in batch):
        assert len(sequence.output) >= 4
        assert_greedy(checkpoint(family), sequence)


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_copies_of_hot_experts_change_nothing(checkpoint, start, family):
    spec = ModelSpec.from_folder(checkpoint(family).folder)
    loads = [[random.Random(layer).randrange(1, 2 ** (1 + e)) for e in range(8)] for layer in spec.moe.sparse_layers]
    expert_map = balanced_expert_map(spec.moe, 2, 4, loads)
    assert any(len(set(slots)) < 8 for layer in expert_map.layers for slots in layer)
    as_lists = [[list(slots) for slots in layer] for layer in expert_map.layers]
    driver = start(family, Mesh(dp=2, expert_parallel=True), expert_map=as_lists)
    for sequence in exercise(driver):
        assert_greedy(checkpoint(family), sequence)


@pytest.mark.parametrize("family", ["qwen3-4-layers", "deepseek-v3"])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=4), Mesh(pp=2, tp=2), Mesh(pp=4)], ids=lambda mesh: mesh.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_takes_the_bytes_that_were_planned(checkpoint, start, family, mesh, dtype):
    driver = start(family, mesh, dtype=dtype)
    spec = ModelSpec.from_folder(checkpoint(family).folder)
    planned = spec.kv_bytes_per_token_per_stage(mesh, dtype)
    for rank, runner in enumerate(driver.ranks.runners):
        _, stage, _ = mesh.coordinates(rank)
        assert runner.cache_bytes == NUM_BLOCKS * BLOCK_SIZE * planned[stage]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen3", "deepseek-v3"])
def test_narrow_dtypes_are_as_close_to_fp32_as_transformers(checkpoint, start, family, dtype):
    assert_as_close(checkpoint(family), family, start(family, 2, dtype=dtype), dtype)


def assert_as_close(checkpoint, family, driver, dtype):
    params = SamplingParams(max_tokens=99, temperature=0.0, logprobs=0)
    sequence = driver.generate(prompt_of(30), 40, params)
    narrow = copy.deepcopy(checkpoint.reference).to(getattr(torch, dtype))
    with torch.inference_mode():
        theirs = narrow(torch.tensor([sequence.token_ids])).logits[0].float()
    exact, theirs = (torch.log_softmax(x, dim=-1) for x in (checkpoint.logits(sequence.token_ids), theirs))
    rows, tokens = torch.arange(29, 69), torch.tensor(sequence.output)
    ours = torch.tensor([reported.logprob for reported in sequence.logprobs])
    # One router that decides otherwise, which happens to both, moves a mean far.
    average = torch.median if family in SPARSE else torch.mean
    error, their_error = (average((x - exact[rows, tokens]).abs()) for x in (ours, theirs[rows, tokens]))
    assert error <= 1.5 * their_error + 1e-3


@pytest.mark.parametrize(
    ("family", "mesh"),
    [("qwen3", Mesh(tp=2)), ("deepseek-v3", Mesh(dp=2, pp=2, expert_parallel=True)), ("mixtral", Mesh(pp=2, tp=2))],
    ids=lambda value: getattr(value, "name", value),
)
def test_without_a_compiler_the_torch_kernels_and_gloo_say_the_same(checkpoint, start, monkeypatch, family, mesh):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for sequence in exercise(start(family, mesh)):
        assert_greedy(checkpoint(family), sequence)


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("family", [*DENSE, *SPARSE])
def test_on_cuda_every_family_equals_transformers(checkpoint, start, family):
    for sequence in exercise(start(family, device="cuda")):
        assert_greedy(checkpoint(family), sequence)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize(("family", "captured"), [("qwen3", True), ("mixtral", False), ("deepseek-v3", False)])
def test_on_cuda_captured_steps_of_any_size_equal_transformers(checkpoint, start, family, captured):
    """Sequences end one by one, so that graphs of several sizes run, with and without padding; one is long.

    Experts in FP32 wait for the host and latents have no padding, so that their steps are not captured.
    """
    driver = start(family, device="cuda", max_num_seqs=16, max_model_len=900)
    driver.ranks.on_every_rank("warm_up")
    runner = driver.ranks.runners[0]
    assert runner.num_captured == (5 if captured else 0)
    sequences = [new_sequence(i, 1 + 5 * i) for i in range(11)] + [new_sequence(11, 700)]
    driver.step(sequences)
    for running in range(12):
        driver.step(sequences[running:])
        driver.step(sequences[running:])
    for sequence in sequences:
        assert_greedy(checkpoint(family), sequence)


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "deepseek-v3"])
def test_on_cuda_bfloat16_is_as_close_to_fp32_as_transformers(checkpoint, start, family):
    driver = start(family, device="cuda", dtype="bfloat16")
    driver.ranks.on_every_rank("warm_up")
    assert (driver.ranks.runners[0].num_captured > 0) == (family != "deepseek-v3")
    assert_as_close(checkpoint(family), family, driver, "bfloat16")


@pytest.mark.gpu
@on_cuda
def test_on_cuda_draws_are_those_of_the_cpu(checkpoint, start):
    params = SamplingParams(max_tokens=99, temperature=1.0, top_p=0.9, seed=7)
    drawn = [start("llama", device=device).generate(prompt_of(12), 30, params).output for device in ("cpu", "cuda")]
    assert drawn[0] == drawn[1]
