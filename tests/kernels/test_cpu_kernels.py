"""The C++ kernels compute what the torch reference computes, over random shapes."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgewalk.kernels.build import load_library
from ridgewalk.kernels.cpu_kernels import CpuKernels
from ridgewalk.kernels.kernel_set import HeadLayout
from ridgewalk.kernels.torch_kernels import TorchKernels

REFERENCE = TorchKernels()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
QUICK = settings(max_examples=30, deadline=None)

dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def kernels():
    library = load_library()
    assert library is not None, "g++ is needed for these tests"
    return CpuKernels(library, 2)


def assert_close(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def normal(generator, *shape, dtype, scale=1.0):
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@QUICK
@given(rows=st.integers(1, 70), width=st.integers(1, 700), dtype=dtypes, seed=seeds)
def test_norms(kernels, rows, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x, residual, weight = (normal(g, *shape, dtype=dtype) for shape in ((rows, width), (rows, width), (width,)))
    assert_close(kernels.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    ours, theirs = residual.clone(), residual.clone()
    assert_close(kernels.add_rms_norm(x, ours, weight, 1e-6), REFERENCE.add_rms_norm(x, theirs, weight, 1e-6))
    assert torch.equal(ours, theirs)


@QUICK
@given(
    rows=st.integers(1, 300),
    outputs=st.integers(1, 200),
    inputs=st.integers(1, 150),
    bias=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_linear_and_rows(kernels, rows, outputs, inputs, bias, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    weight, x = normal(g, outputs, inputs, dtype=dtype), normal(g, rows, inputs, dtype=dtype)
    added = normal(g, outputs, dtype=dtype) if bias else None
    matrix = kernels.pack(weight)
    wide = x.double() @ weight.double().T + (added.double() if bias else 0)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(kernels.linear(x, matrix, added).double(), wide, rtol=tolerance, atol=tolerance)
    indices = torch.randint(0, outputs, (rows,), generator=g)
    assert torch.equal(kernels.rows(matrix, indices), weight[indices])


def test_a_row_of_a_product_does_not_notice_the_others(kernels):
    g = torch.Generator().manual_seed(0)
    matrix = kernels.pack(normal(g, 100, 64, dtype=torch.bfloat16))
    x = normal(g, 50, 64, dtype=torch.bfloat16)
    together = kernels.linear(x, matrix)
    assert all(torch.equal(kernels.linear(x[row : row + 1], matrix)[0], together[row]) for row in range(50))


@QUICK
@given(rows=st.integers(1, 70), width=st.integers(1, 500), dtype=dtypes, seed=seeds)
def test_silu_and_mul(kernels, rows, width, dtype, seed):
    gate_up = normal(torch.Generator().manual_seed(seed), rows, 2 * width, dtype=dtype, scale=20.0)
    assert_close(kernels.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up))


@QUICK
@given(rows=st.integers(1, 40), width=st.integers(1, 3000), dtype=dtypes, seed=seeds)
def test_arg_max_takes_the_first_of_equals(kernels, rows, width, dtype, seed):
    logits = normal(torch.Generator().manual_seed(seed), rows, width, dtype=dtype)
    values, indices = kernels.arg_max(logits)
    assert torch.equal(values, logits.float().amax(dim=-1))
    first = (logits == logits.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)
    assert torch.equal(indices, first)


@QUICK
@given(
    tokens=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (8, 4), (6, 1)]),
    head_dim=st.sampled_from([8, 16, 24, 64, 96, 128]),
    norm=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_rotate_and_cache(kernels, tokens, heads, head_dim, norm, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    layout = HeadLayout(*heads, head_dim)
    qkv = normal(g, tokens, layout.qkv_size, dtype=dtype)
    weights = tuple(normal(g, head_dim, dtype=dtype) for _ in range(2)) if norm else None
    positions = torch.randint(0, 100, (tokens,), generator=g)
    cos_sin = normal(g, 100, head_dim, dtype=torch.float32)
    slots = torch.randperm(tokens + 30, generator=g)[:tokens]
    caches = [torch.zeros(-(-(tokens + 30) // 16), 16, heads[1], head_dim, dtype=dtype) for _ in range(4)]
    query = kernels.rotate_and_cache(
        qkv.clone(), layout, weights, 1e-6, positions, cos_sin, caches[0], caches[1], slots
    )
    expected = REFERENCE.rotate_and_cache(qkv, layout, weights, 1e-6, positions, cos_sin, caches[2], caches[3], slots)
    # A value that rounds the other way before the rotation moves the result by an ulp of a larger number.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(query, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(caches[0], caches[2], rtol=tolerance, atol=tolerance)
    assert torch.equal(caches[1], caches[3])


def paged(g, lengths, block_size, num_kv_heads, head_dim, dtype):
    """Random caches and block tables; what no sequence uses is NaN, which must not leak."""
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 3, generator=g).tolist()
    table = torch.zeros(len(lengths), max(blocks) + 2, dtype=torch.int32)
    caches = [torch.full((sum(blocks) + 3, block_size, num_kv_heads, head_dim), torch.nan).to(dtype) for _ in range(2)]
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        ids = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(ids)
        for cache in caches:
            for i, block in enumerate(ids):
                filled = min(block_size, length - i * block_size)
                cache[block, :filled] = normal(g, filled, num_kv_heads, head_dim, dtype=dtype)
    return caches, table


@settings(max_examples=70, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 150)), min_size=1, max_size=6),
    decode_only=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 4), (8, 4), (8, 2), (7, 1), (12, 4), (16, 1)]),
    head_dim=st.sampled_from([16, 32, 48, 64, 80, 128]),
    block_size=st.sampled_from([1, 3, 4, 16, 32, 100]),
    dtype=dtypes,
    seed=seeds,
)
def test_attention(kernels, sequences, decode_only, heads, head_dim, block_size, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    queries = [1 if decode_only else count for count, _ in sequences]
    used = [count + before for count, (_, before) in zip(queries, sequences, strict=True)]
    check_attention(kernels, g, queries, used, heads, head_dim, block_size, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [511, 512, 513, 1100, 3000])
def test_long_sequences_are_split_and_merged(kernels, length, dtype):
    g = torch.Generator().manual_seed(length)
    check_attention(kernels, g, [1, 1, 1], [length, 7, 600], (8, 4), 64, 16, dtype)


def check_attention(kernels, g, queries, used, heads, head_dim, block_size, dtype):
    (keys, values), table = paged(g, used, block_size, heads[1], head_dim, dtype)
    query = normal(g, sum(queries), heads[0], head_dim, dtype=dtype, scale=2.0)
    cu_seqlens = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    arguments = (keys, values, cu_seqlens, max(queries), max(used))
    options = {"scale": head_dim**-0.5, "seqused_k": torch.tensor(used, dtype=torch.int32), "block_table": table}
    actual = kernels.attention(query, *arguments, **options)
    wide = REFERENCE.attention(query.float(), keys.float(), values.float(), *arguments[2:], **options)
    torch.testing.assert_close(actual.float(), wide, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_sequence_does_not_notice_the_rest_of_the_batch(kernels):
    g = torch.Generator().manual_seed(3)
    used = [700, 40, 1300, 5]
    (keys, values), table = paged(g, used, 16, 4, 64, torch.bfloat16)
    query = normal(g, 4, 8, 64, dtype=torch.bfloat16)

    def run(rows):
        count = len(rows)
        return kernels.attention(
            query[rows],
            keys,
            values,
            torch.arange(count + 1, dtype=torch.int32),
            1,
            max(used),
            scale=0.125,
            seqused_k=torch.tensor([used[row] for row in rows], dtype=torch.int32),
            block_table=table[rows],
        )

    together = run([0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(run([row])[0], together[row])


def test_pools_of_several_threads_lose_no_work():
    """Many small jobs, from two callers with a pool each, with more threads than cores."""
    library = load_library()
    g = torch.Generator().manual_seed(0)
    inputs, weight = normal(g, 2, 40, 64, dtype=torch.float32), normal(g, 320, 64, dtype=torch.float32)
    wrong = []

    def work():
        kernels = CpuKernels(library, 4)
        matrix = kernels.pack(weight)
        expected = [kernels.linear(x, matrix) for x in inputs]
        for number in range(800):  # what is left of the last round in memory is wrong in this one
            if not torch.equal(kernels.linear(inputs[number % 2], matrix), expected[number % 2]):
                wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
