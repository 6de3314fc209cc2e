"""What one rank reaches with the engine's own kernels: products by rows, and attention over a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch

from ridgewalk.calibration.figures import KernelRates
from ridgewalk.calibration.stopwatch import Stopwatch
from ridgewalk.kernels.kernel_set import HeadLayout, KernelSet, Matrix

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUERY_HEADS = (1, 2, 4, 8)
"""Per KV head."""

COLD_BYTES = 96 * 2**20
"""Weights, or KV, that calls cycle through: more than the last cache of the CPUs that we know, as a model's are."""

SIDE = 1024
"""Of the weights of a product, which are square. With 512 x 1024 to 2048 x 2048 rates differed by under a fifth."""

KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 64, 16
SEQUENCES, CONTEXT = 16, 512
PROMPTS, PROMPT = 4, 256
TOKENS = 32
LATENT_HEADS, LATENT_DIM, LATENT_VALUE_DIM = 8, 160, 128


def measure_kernels(
    kernels: KernelSet, dtype: torch.dtype, stopwatch: Stopwatch, cold_bytes: int = COLD_BYTES
) -> KernelRates:
    """All rates of a dtype, on every rank of the stopwatch at once. Takes about six samples' time a rate."""
    products = _products(kernels, dtype, stopwatch, cold_bytes)
    return KernelRates(
        weight_bandwidth=SIDE * SIDE * dtype.itemsize / products[1],
        product_flops={rows: 2 * rows * SIDE * SIDE / seconds for rows, seconds in products.items()},
        attention_bandwidth={
            heads: _decode_bandwidth(kernels, dtype, stopwatch, heads, cold_bytes) for heads in QUERY_HEADS
        },
        attention_flops=_prompt_flops(kernels, dtype, stopwatch),
        latent_attention_flops=_latent_flops(kernels, dtype, stopwatch),
        value_s=_value_s(kernels, dtype, stopwatch),
    )


def _products(kernels: KernelSet, dtype: torch.dtype, stopwatch: Stopwatch, cold_bytes: int) -> dict[int, float]:
    """Seconds of a product of so many rows with weights that no cache holds."""
    weight = torch.randn(SIDE, SIDE).to(dtype)
    count = max(2, cold_bytes // (weight.numel() * weight.element_size()))
    matrices = cycle([kernels.pack(weight) for _ in range(count)])
    return {rows: stopwatch.seconds_per_call(_product(kernels, matrices, rows, dtype)) for rows in ROWS}


def _product(kernels: KernelSet, matrices: cycle[Matrix], rows: int, dtype: torch.dtype) -> Callable[[], object]:
    x = torch.randn(rows, SIDE).to(dtype)
    return lambda: kernels.linear(x, next(matrices))


def _decode_bandwidth(
    kernels: KernelSet, dtype: torch.dtype, stopwatch: Stopwatch, heads: int, cold_bytes: int
) -> float:
    """Bytes of KV a second, read by one query a sequence from blocks all over a cache."""
    batch_bytes = SEQUENCES * CONTEXT * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
    batches = max(2, cold_bytes // batch_bytes)
    blocks = SEQUENCES * CONTEXT // BLOCK_SIZE
    caches = [torch.randn(batches * blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2)]
    order = torch.randperm(batches * blocks).to(torch.int32)
    tables = cycle(order.view(batches, SEQUENCES, -1).unbind())
    query = torch.randn(SEQUENCES, KV_HEADS * heads, HEAD_DIM).to(dtype)
    starts, used = _lengths(SEQUENCES, 1, CONTEXT)

    def call() -> object:
        return kernels.attention(
            query, *caches, starts, 1, CONTEXT, scale=0.1, seqused_k=used, block_table=next(tables)
        )  # fmt: skip

    return batch_bytes / stopwatch.seconds_per_call(call)


def _prompt_flops(kernels: KernelSet, dtype: torch.dtype, stopwatch: Stopwatch) -> float:
    """FLOP/s of scores and values of whole prompts."""
    heads, blocks = 2 * KV_HEADS, PROMPTS * PROMPT // BLOCK_SIZE
    caches = [torch.randn(blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2)]
    table = torch.randperm(blocks).to(torch.int32).view(PROMPTS, -1)
    query = torch.randn(PROMPTS * PROMPT, heads, HEAD_DIM).to(dtype)
    starts, used = _lengths(PROMPTS, PROMPT, PROMPT)

    def call() -> object:
        return kernels.attention(
            query, *caches, starts, PROMPT, PROMPT, scale=0.1, seqused_k=used, block_table=table
        )  # fmt: skip

    pairs = PROMPTS * PROMPT * (PROMPT + 1) / 2
    return pairs * 4 * heads * HEAD_DIM / stopwatch.seconds_per_call(call)


def _latent_flops(kernels: KernelSet, dtype: torch.dtype, stopwatch: Stopwatch) -> float:
    """FLOP/s of decode over latents (MLA), which all heads read."""
    blocks = SEQUENCES * CONTEXT // BLOCK_SIZE
    cache = torch.randn(blocks, BLOCK_SIZE, LATENT_DIM).to(dtype)
    table = torch.randperm(blocks).to(torch.int32).view(SEQUENCES, -1)
    query = torch.randn(SEQUENCES, LATENT_HEADS, LATENT_DIM).to(dtype)
    starts, used = _lengths(SEQUENCES, 1, CONTEXT)

    def call() -> object:
        return kernels.latent_attention(
            query, cache, starts, 1, CONTEXT, value_dim=LATENT_VALUE_DIM, scale=0.1, seqused_k=used, block_table=table
        )  # fmt: skip

    flops = SEQUENCES * CONTEXT * LATENT_HEADS * 2 * (LATENT_DIM + LATENT_VALUE_DIM)
    return flops / stopwatch.seconds_per_call(call)


def _value_s(kernels: KernelSet, dtype: torch.dtype, stopwatch: Stopwatch) -> float:
    """Seconds of a layer beside its products and attention, for each value of the hidden states of its tokens.

    Two norms, rotation of half as many keys as queries, and the activation of an MLP three times as wide.
    """
    heads = HeadLayout(SIDE // HEAD_DIM, SIDE // HEAD_DIM // 2, HEAD_DIM)
    hidden, qkv = (torch.randn(TOKENS, width).to(dtype) for width in (SIDE, heads.qkv_size))
    residual, gate_up, norm = torch.zeros_like(hidden), torch.randn(TOKENS, 6 * SIDE).to(dtype), torch.ones(SIDE)
    caches = [torch.zeros(TOKENS, BLOCK_SIZE, heads.num_kv_heads, HEAD_DIM, dtype=dtype) for _ in range(2)]
    norm, head_norms = norm.to(dtype), (torch.ones(HEAD_DIM, dtype=dtype),) * 2
    positions, cos_sin = torch.arange(TOKENS), torch.zeros(TOKENS, HEAD_DIM)
    slots = positions * BLOCK_SIZE

    def call() -> None:
        for _ in range(2):
            kernels.add_rms_norm(hidden, residual, norm, 1e-6)
        kernels.rotate_and_cache(qkv, heads, head_norms, 1e-6, positions, cos_sin, *caches, slots)
        kernels.silu_and_mul(gate_up)

    return stopwatch.seconds_per_call(call) / TOKENS / SIDE


def _lengths(sequences: int, queries: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``cu_seqlens_q`` and ``seqused_k`` of equal sequences."""
    starts = torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32)
    return starts, torch.full((sequences,), context, dtype=torch.int32)
