"""Triton's kernels compute what the torch reference computes: on a GPU, or here through Triton's interpreter.

The interpreter multiplies no BF16 matrices and rounds to BF16 by cutting off, so that BF16 is left to GPUs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ON_GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton")
if not ON_GPU and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    pytest.skip("Triton's interpreter before 3.9 does not work with today's numpy", allow_module_level=True)

from ridgewalk.kernels import probe_triton as probe  # noqa: E402
from ridgewalk.kernels import triton_attention  # noqa: E402
from ridgewalk.kernels.cuda_kernels import TritonKernels  # noqa: E402
from ridgewalk.kernels.kernel_set import DrawRules, HeadLayout  # noqa: E402
from ridgewalk.kernels.latent_kernels import LatentLayout  # noqa: E402
from ridgewalk.kernels.torch_kernels import TorchKernels  # noqa: E402
from ridgewalk.kernels.triton_attention import MAX_SPLITS, MIN_SPLITS, num_splits  # noqa: E402
from tests.kernels.test_cpu_kernels import normal, paged  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
REFERENCE = TorchKernels()
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
few = settings(max_examples=40 if ON_GPU else 6, deadline=None)
dtypes = st.sampled_from(list(TOLERANCE) if ON_GPU else [torch.float32, torch.float16])
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def kernels():
    return TritonKernels()


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def assert_close(actual, expected, tolerance=None):
    tolerance = tolerance or TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.cpu().float(), expected.float(), rtol=tolerance, atol=tolerance)


@few
@given(rows=st.integers(0, 9), width=st.integers(1, 700), dtype=dtypes, seed=seeds)
def test_norms(kernels, rows, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x, residual, weight = (normal(g, *shape, dtype=dtype) for shape in ((rows, width), (rows, width), (width,)))
    assert_close(kernels.rms_norm(*on_device(x, weight), 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    ours, theirs = residual.to(DEVICE, copy=True), residual.clone()
    expected = REFERENCE.add_rms_norm(x, theirs, weight, 1e-6)
    assert_close(kernels.add_rms_norm(x.to(DEVICE), ours, weight.to(DEVICE), 1e-6), expected)
    assert_close(ours, theirs)


@few
@given(rows=st.integers(0, 5), width=st.integers(1, 1500), dtype=dtypes, seed=seeds)
def test_silu_and_mul(kernels, rows, width, dtype, seed):
    gate_up = normal(torch.Generator().manual_seed(seed), rows, 2 * width, dtype=dtype, scale=20.0)
    assert_close(kernels.silu_and_mul(gate_up.to(DEVICE)), REFERENCE.silu_and_mul(gate_up))


@few
@given(
    tokens=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    head_dim=st.sampled_from([8, 64, 96, 128]),
    norm=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_rotate_and_cache_writes_all_but_padding(kernels, tokens, heads, head_dim, norm, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    layout = HeadLayout(*heads, head_dim)
    qkv, cos_sin = normal(g, tokens, layout.qkv_size, dtype=dtype), normal(g, 100, head_dim, dtype=torch.float32)
    weights = [normal(g, head_dim, dtype=dtype) for _ in range(2)]
    positions, slots = torch.randint(0, 100, (tokens,), generator=g), torch.randperm(32, generator=g)[:tokens]
    expected = [torch.zeros(2, 16, heads[1], head_dim, dtype=dtype) for _ in range(2)]
    caches = on_device(*expected)
    caches = [cache.clone() for cache in caches]
    padded = torch.cat((qkv, qkv[:1])), torch.cat((positions, positions[:1])), torch.cat((slots, torch.tensor([-1])))
    ours, at, where = on_device(*padded)
    norms = tuple(on_device(*weights)) if norm else None
    query = kernels.rotate_and_cache(ours, layout, norms, 1e-6, at, cos_sin.to(DEVICE), *caches, where)
    wanted = REFERENCE.rotate_and_cache(
        qkv, layout, tuple(weights) if norm else None, 1e-6, positions, cos_sin, *expected, slots
    )
    # A value that rounds the other way before the rotation moves the result by an ulp of a larger number.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    assert_close(query[:tokens], wanted, tolerance)
    assert_close(caches[0], expected[0], tolerance)
    assert torch.equal(caches[1].cpu(), expected[1])


batches = st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0, 1, 90, 255, 256])), min_size=1, max_size=3)


@few
@given(
    sequences=batches,
    decode_only=st.booleans(),
    heads=st.sampled_from([(1, 1), (8, 4), (7, 1), (20, 1)]),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    block_size=st.sampled_from([1, 16, 100]),
    dtype=dtypes,
    seed=seeds,
)
def test_attention(kernels, sequences, decode_only, heads, head_dim, block_size, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    queries, used, starts = lay_out(sequences, decode_only)
    (keys, values), table = paged(g, used, block_size, heads[1], head_dim, dtype)
    query = normal(g, sum(queries), heads[0], head_dim, dtype=dtype, scale=2.0)
    longest = (max(queries), max(used))
    on_cpu = (query, keys, values, starts)
    lengths = torch.tensor(used, dtype=torch.int32)
    ours = kernels.attention(*on_device(*on_cpu), *longest, scale=head_dim**-0.5, **placed(lengths, table))
    wide = (tensor.float() for tensor in on_cpu[:3])
    options = {"scale": head_dim**-0.5, "seqused_k": lengths, "block_table": table}
    assert_close(ours, REFERENCE.attention(*wide, starts, *longest, **options))


@few
@given(
    sequences=batches,
    decode_only=st.booleans(),
    num_heads=st.sampled_from([1, 16, 20]),
    dims=st.sampled_from([(32, 16), (512, 64) if ON_GPU else (128, 64), (24, 8)]),
    dtype=dtypes,
    seed=seeds,
)
def test_latent_attention(kernels, sequences, decode_only, num_heads, dims, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    queries, used, starts = lay_out(sequences, decode_only)
    (cache, _), table = paged(g, used, 16, 1, sum(dims), dtype)
    cache = cache.squeeze(2)
    query = normal(g, sum(queries), num_heads, sum(dims), dtype=dtype)
    longest = (max(queries), max(used))
    lengths = torch.tensor(used, dtype=torch.int32)
    fixed = {"value_dim": dims[0], "scale": sum(dims) ** -0.5}
    ours = kernels.latent_attention(*on_device(query, cache, starts), *longest, **fixed, **placed(lengths, table))
    options = {**fixed, "seqused_k": lengths, "block_table": table}
    assert_close(ours, REFERENCE.latent_attention(query.float(), cache.float(), starts, *longest, **options))


def lay_out(sequences, decode_only):
    """Queries and keys of each sequence, and where the queries begin."""
    queries = [1 if decode_only else count for count, _ in sequences]
    used = [count + before for count, (_, before) in zip(queries, sequences, strict=True)]
    return queries, used, torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)


def placed(lengths, table):
    return {"seqused_k": lengths.to(DEVICE), "block_table": table.to(DEVICE)}


def test_rows_without_keys_get_zeros(kernels):
    g = torch.Generator().manual_seed(0)
    (keys, values), table = paged(g, [300, 5], 16, 2, 64, torch.float32)
    query = normal(g, 2, 4, 64, dtype=torch.float32)
    starts, lengths = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([300, 0], dtype=torch.int32)
    out = kernels.attention(*on_device(query, keys, values, starts), 1, 300, scale=0.125, **placed(lengths, table))
    assert (out[1] == 0).all()
    assert out[0].isfinite().all()
    assert (out[0] != 0).all()


@few
@given(
    vocab_size=st.integers(1, 4500),
    temperature=st.sampled_from([0.0, 1e-4, 0.6, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 10_000]),
    top_p=st.sampled_from([0.0, 0.3, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    coarse=st.booleans(),
    seed=seeds,
)
def test_draw(kernels, vocab_size, temperature, top_k, top_p, min_p, coarse, seed):
    """Coarse logits have many equals, which are kept in the order of their ids."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((3, vocab_size), generator=g)
    logits = logits.round() if coarse else logits
    logits[2, : vocab_size // 2] = -torch.inf
    rules = DrawRules(
        torch.full((3,), temperature),
        torch.full((3,), top_k),
        torch.full((3,), top_p, dtype=torch.float64),
        torch.full((3,), min_p, dtype=torch.float64),
        torch.rand(3, generator=g, dtype=torch.float64),
    )
    drawn, expected = kernels.draw(logits.to(DEVICE), rules).cpu(), REFERENCE.draw(logits, rules)
    for row in (drawn != expected).nonzero().flatten().tolist():
        assert_drawn_by_rounding(logits[row], rules, row, int(drawn[row]))


def assert_drawn_by_rounding(logits, rules, row, drawn):
    """A draw other than the reference's is right where a sum that rounds otherwise makes it so."""
    assert rules.temperature[row] > 0
    probable = torch.stack([kept_by_rule(logits, rules, row, slack) for slack in (-1e-6, 0.0, 1e-6)])
    ends = probable.cumsum(dim=-1) / probable.sum(dim=-1, keepdim=True)
    starts = ends - probable / probable.sum(dim=-1, keepdim=True)
    uniform = float(rules.uniform[row])
    right = (starts[:, drawn] - 1e-5 <= uniform) & (uniform <= ends[:, drawn] + 1e-5) & (probable[:, drawn] > 0)
    assert right.any()


def kept_by_rule(logits, rules, row, slack):
    """FP64 weights of the tokens that are kept, by sorting; top-p wants ``slack`` more of the mass."""
    weights = ((logits - logits.max()) / rules.temperature[row]).double().exp()
    order = sorted(range(len(weights)), key=lambda token: (-float(weights[token]), token))
    order = order[: int(rules.top_k[row]) or len(order)]
    kept, mass = [], 0.0
    total = float(weights[order].sum())
    for token in order:
        if kept and (rules.top_p[row] < 1 and mass >= (float(rules.top_p[row]) + slack) * total):
            break
        if not kept or weights[token] >= rules.min_p[row]:
            kept.append(token)
        mass += float(weights[token])
    return torch.zeros_like(weights).index_put_((torch.tensor(kept),), weights[kept])


@pytest.fixture
def quick_probe(monkeypatch):
    """Over fewer keys: the interpreter takes its time."""
    if not ON_GPU:
        monkeypatch.setattr(probe, "LONGEST", 300)


def test_probe_takes_what_agrees(quick_probe):
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    for heads in (HeadLayout(4, 2, 32), LatentLayout(4, 32, 16)):
        assert probe.probe_triton(heads, dtype, 16, DEVICE).name == "triton"


@pytest.mark.parametrize("fault", ["differs", "fails"])
@pytest.mark.parametrize("kernel", ["attention", "add_rms_norm", "silu_and_mul", "rotate_and_cache", "draw"])
def test_probe_leaves_what_differs_or_fails(quick_probe, monkeypatch, caplog, kernel, fault):
    def broken(self, *arguments, **options):
        if fault == "fails":
            raise RuntimeError("no C compiler")
        return getattr(REFERENCE, kernel)(*arguments, **options) + 1

    monkeypatch.setattr(TritonKernels, kernel, broken)
    assert probe.probe_triton(HeadLayout(2, 1, 16), torch.float16, 16, DEVICE).name == "torch"
    assert ("no C compiler" if fault == "fails" else "differ") in caplog.text


@pytest.mark.parametrize("rule", ["top_k", "top_p", "min_p", "temperature"])
def test_probe_notices_a_rule_that_is_left_out(quick_probe, monkeypatch, rule):
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}

    def draw(self, logits, rules):
        field = getattr(rules, rule)
        return REFERENCE.draw(logits, replace(rules, **{rule: torch.full_like(field, neutral[rule])}))

    monkeypatch.setattr(TritonKernels, "draw", draw)
    assert probe.probe_triton(HeadLayout(2, 1, 16), torch.float16, 16, DEVICE).name == "torch"


def test_one_sequence_has_many_programs_and_many_have_few():
    assert num_splits(8, 100_000) == MAX_SPLITS
    assert num_splits(8, 300) == 2
    assert num_splits(8, 0) == 1
    assert num_splits(1024 * 8, 100_000) == MIN_SPLITS


@pytest.mark.parametrize("most", [64, 3])
def test_long_sequences_are_divided_evenly(kernels, monkeypatch, most):
    """Into more parts than are merged at once, or into larger ones than programs take at their least."""
    monkeypatch.setattr(triton_attention, "MIN_SPLITS", most)
    monkeypatch.setattr(triton_attention, "MAX_SPLITS", most)
    length = 4500
    g = torch.Generator().manual_seed(length)
    (keys, values), table = paged(g, [length, 3], 100, 1, 16, torch.float32)
    query = normal(g, 2, 1, 16, dtype=torch.float32, scale=2.0)
    starts, lengths = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([length, 3], dtype=torch.int32)
    ours = kernels.attention(*on_device(query, keys, values, starts), 1, length, scale=0.25, **placed(lengths, table))
    options = {"scale": 0.25, "seqused_k": lengths, "block_table": table}
    assert_close(ours, REFERENCE.attention(query, keys, values, starts, 1, length, **options))
