"""Latent attention: the C++ kernels against the torch reference, and the reference against the expanded form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb, apply_rotary_pos_emb_interleave

from ridgewalk.kernels.build import load_library
from ridgewalk.kernels.cpu_kernels import CpuKernels
from ridgewalk.kernels.torch_kernels import TorchKernels

REFERENCE = TorchKernels()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
QUICK = settings(max_examples=40, deadline=None)

dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def kernels():
    library = load_library()
    assert library is not None, "g++ is needed for these tests"
    return CpuKernels(library, 2)


def normal(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@QUICK
@given(
    tokens=st.integers(0, 300),
    heads=st.integers(1, 5),
    outputs=st.integers(1, 80),
    inputs=st.integers(1, 80),
    beside=st.integers(0, 9),
    dtype=dtypes,
    seed=seeds,
)
def test_head_linear_of_a_part_of_each_head(kernels, tokens, heads, outputs, inputs, beside, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = normal(g, tokens, heads, inputs + beside, dtype=dtype)[:, :, :inputs]
    weight = normal(g, heads, inputs, outputs, dtype=dtype, scale=inputs**-0.5).transpose(1, 2)
    expected = torch.einsum("tha,hba->thb", x.double(), weight.double())
    for each in (kernels, REFERENCE):
        actual = each.head_linear(x, each.pack_heads(weight))
        torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@QUICK
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 5),
    latent=st.integers(1, 70),
    rope=st.sampled_from([2, 8, 32, 64]),
    interleaved=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_latent_rotate_and_cache(kernels, tokens, heads, latent, rope, interleaved, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    query = normal(g, tokens, heads, 7 + rope, dtype=dtype)[:, :, 7:]
    kv, weight = normal(g, tokens, latent + rope, dtype=dtype), normal(g, latent, dtype=dtype)
    positions, cos_sin = torch.randint(0, 50, (tokens,), generator=g), normal(g, 50, rope)
    slots = torch.randperm(tokens + 30, generator=g)[:tokens]
    caches = [torch.zeros(-(-(tokens + 30) // 16), 16, latent + rope, dtype=dtype) for _ in range(2)]
    actual, expected = (
        each.latent_rotate_and_cache(query, kv, weight, 1e-6, positions, cos_sin, cache, slots, interleaved)
        for each, cache in zip((kernels, REFERENCE), caches, strict=True)
    )
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(*caches, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotates_as_transformers(interleaved):
    g = torch.Generator().manual_seed(0)
    query, kv, angles = normal(g, 6, 3, 8), normal(g, 6, 24), normal(g, 6, 4)
    cos, sin = angles.cos(), angles.sin()
    cache = torch.zeros(1, 6, 24)
    rotate = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    key = kv[None, None, :, 16:]
    expected = rotate(
        query.transpose(0, 1)[None], key, torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
    )
    actual = REFERENCE.latent_rotate_and_cache(
        query, kv, torch.ones(16), 1e-6, torch.arange(6), torch.cat((cos, sin), -1), cache, torch.arange(6), interleaved
    )
    torch.testing.assert_close(actual, expected[0][0].transpose(0, 1))
    torch.testing.assert_close(cache[0, :, 16:], expected[1][0, 0])


def paged(g, lengths, block_size, width, dtype):
    """A random cache and block tables; what no sequence uses is NaN, which must not leak."""
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 3, generator=g).tolist()
    table = torch.zeros(len(lengths), max(blocks) + 2, dtype=torch.int32)
    cache = torch.full((sum(blocks) + 3, block_size, width), torch.nan).to(dtype)
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        ids = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(ids)
        for i, block in enumerate(ids):
            filled = min(block_size, length - i * block_size)
            cache[block, :filled] = normal(g, filled, width, dtype=dtype)
    return cache, table


def arguments_of(g, queries, used, heads, width, value_dim, block_size, dtype):
    cache, table = paged(g, used, block_size, width, dtype)
    query = normal(g, sum(queries), heads, width, dtype=dtype, scale=2.0)
    cu_seqlens = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    options = {
        "value_dim": value_dim,
        "scale": width**-0.5,
        "seqused_k": torch.tensor(used, dtype=torch.int32),
        "block_table": table,
    }
    return (query, cache, cu_seqlens, max(queries), max(used)), options


def check_attention(kernels, g, queries, used, heads, width, value_dim, block_size, dtype):
    arguments, options = arguments_of(g, queries, used, heads, width, value_dim, block_size, dtype)
    actual = kernels.latent_attention(*arguments, **options)
    wide = REFERENCE.latent_attention(arguments[0].float(), arguments[1].float(), *arguments[2:], **options)
    torch.testing.assert_close(actual.float(), wide, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@settings(max_examples=100, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 150)), min_size=1, max_size=6),
    decode_only=st.booleans(),
    heads=st.sampled_from([1, 2, 3, 4, 6, 8, 16, 70]),
    widths=st.sampled_from([(16, 16), (24, 16), (48, 32), (80, 64), (576, 512), (80, 48), (32, 32)]),
    block_size=st.sampled_from([1, 3, 16, 100]),
    dtype=dtypes,
    seed=seeds,
)
def test_latent_attention(kernels, sequences, decode_only, heads, widths, block_size, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    queries = [1 if decode_only else count for count, _ in sequences]
    used = [count + before for count, (_, before) in zip(queries, sequences, strict=True)]
    check_attention(kernels, g, queries, used, heads, *widths, block_size, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [511, 512, 513, 1100, 3000])
def test_long_sequences_are_split_and_merged(kernels, length, dtype):
    g = torch.Generator().manual_seed(length)
    check_attention(kernels, g, [1, 1, 1], [length, 7, 600], 8, 80, 64, 16, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_notice_the_rest_of_the_batch(kernels, dtype):
    g = torch.Generator().manual_seed(3)
    queries, used = [1, 1, 20, 1, 3], [700, 40, 90, 1300, 3]
    (query, cache, starts, *_), options = arguments_of(g, queries, used, 16, 48, 32, 16, dtype)
    together = kernels.latent_attention(query, cache, starts, 20, 1300, **options)
    for row, (begin, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        alone = kernels.latent_attention(
            query[begin:end],
            cache,
            torch.tensor([0, end - begin], dtype=torch.int32),
            end - begin,
            used[row],
            **options
            | {"seqused_k": options["seqused_k"][row : row + 1], "block_table": options["block_table"][row : row + 1]},
        )
        assert torch.equal(alone, together[begin:end])


@pytest.mark.parametrize("queries", [[30, 1, 2], [1, 1, 1]])
def test_reference_goes_through_in_blocks(monkeypatch, queries):
    g = torch.Generator().manual_seed(5)
    arguments, options = arguments_of(g, queries, [50, 9, 2], 3, 24, 16, 16, torch.float32)
    whole = REFERENCE.latent_attention(*arguments, **options)
    monkeypatch.setattr("ridgewalk.kernels.torch_latent.MOST", 800)
    torch.testing.assert_close(REFERENCE.latent_attention(*arguments, **options), whole)


def test_absorbed_attention_is_that_of_expanded_keys_and_values(kernels):
    """MLA's two forms: heads' own keys and values made from the latent, or their matrices moved to query and output."""
    g = torch.Generator().manual_seed(7)
    heads, nope, rope, latent, value, length = 4, 24, 16, 64, 24, 37
    up_key, up_value = normal(g, heads, nope, latent, scale=0.125), normal(g, heads, value, latent, scale=0.125)
    query, cached = normal(g, length, heads, nope + rope), normal(g, length, latent + rope)
    keys = torch.einsum("tl,hnl->htn", cached[:, :latent], up_key)
    keys = torch.cat((keys, cached[None, :, latent:].expand(heads, -1, -1)), dim=-1)
    values = torch.einsum("tl,hvl->htv", cached[:, :latent], up_value)
    expanded = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), keys, values, is_causal=True, scale=0.2
    ).transpose(0, 1)
    for each in (kernels, REFERENCE):
        absorbed = each.head_linear(query[:, :, :nope], each.pack_heads(up_key.transpose(1, 2)))
        attended = each.latent_attention(
            torch.cat((absorbed, query[:, :, nope:]), dim=-1),
            cached[None],
            torch.tensor([0, length], dtype=torch.int32),
            length,
            length,
            value_dim=latent,
            scale=0.2,
            seqused_k=torch.tensor([length], dtype=torch.int32),
            block_table=torch.zeros(1, 1, dtype=torch.int32),
        )
        out = each.head_linear(attended, each.pack_heads(up_value))
        torch.testing.assert_close(out, expanded, rtol=1e-4, atol=1e-5)
