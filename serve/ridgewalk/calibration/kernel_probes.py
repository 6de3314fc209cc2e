"""What one rank reaches with the engine's own kernels: products and experts by rows, and attention over a KV
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from ridgewalk.calibration.figures import KernelRates
from ridgewalk.kernels.expert_kernels import ExpertWeights
from ridgewalk.kernels.kernel_set import HeadLayout, KernelSet, Matrix

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUERY_HEADS = (1, 2, 4, 8)
"""Per KV head."""

COLD_BYTES = 96 * 2**20
"""Weights, or KV, that calls of all ranks together cycle through: more than the last cache of the CPUs that we know, as
a model's are."""

SIDE = 1024
"""Columns of a product's weights, and half of their rows.

Beside a time for each weight a call has one of its own: with two threads, 14 us where a product of 1024 x 1024 takes
117. That is a layer's overhead, and among the rates it would make one rank of many threads look slower than it is.
"""

EXPERTS, EXPERT_HIDDEN, EXPERT_INNER = 32, 512, 256
EXPERT_ROWS = (1, 2, 4, 8, 16, 64)
"""Of each expert."""

SLICES, SLICED_ROWS = 4, (4, 16)
"""Ranks that an expert is split among, and rows of each."""

KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 64, 16
SEQUENCES, CONTEXT = 16, 512
PROMPTS, PROMPT = 4, 256
TOKENS = 32
LATENT_HEADS, LATENT_DIM, LATENT_VALUE_DIM = 8, 160, 128


@dataclass(frozen=True)
class Probe:
    """One call of the engine's kernels, and how much it does: FLOPs, bytes, or values of hidden states."""

    amount: float
    call: Callable[[], object]


def make_probes(kernels: KernelSet, dtype: torch.dtype, cold_bytes: int = COLD_BYTES) -> dict[str, Probe]:
    """By name, as `kernel_rates` knows them."""
    products = {f"product {rows}": probe for rows, probe in _products(kernels, dtype, cold_bytes).items()}
    layers = _layers_of_experts(kernels, dtype, cold_bytes)
    sliced = [_slices(layer) for layer in layers]
    experts = {f"experts {rows}": _experts(kernels, layers, rows, dtype) for rows in EXPERT_ROWS}
    experts |= {f"sliced experts {rows}": _experts(kernels, sliced, rows, dtype) for rows in SLICED_ROWS}
    decodes = {f"decode {heads}": probe for heads, probe in _decodes(kernels, dtype, cold_bytes).items()}
    others = {"prompt": _prompt(kernels, dtype), "latent": _latent(kernels, dtype), "values": _values(kernels, dtype)}
    return products | experts | decodes | others


def kernel_rates(rates: Mapping[str, float], dtype: torch.dtype) -> KernelRates:
    """From amounts a second by probe."""
    return KernelRates(
        weight_bandwidth=rates["product 1"] / 2 * dtype.itemsize,  # two FLOPs a weight
        product_flops={rows: rates[f"product {rows}"] for rows in ROWS},
        attention_bandwidth={heads: rates[f"decode {heads}"] for heads in QUERY_HEADS},
        attention_flops=rates["prompt"],
        latent_attention_flops=rates["latent"],
        expert_flops={rows: rates[f"experts {rows}"] for rows in EXPERT_ROWS},
        sliced_expert_flops={rows: rates[f"sliced experts {rows}"] for rows in SLICED_ROWS},
        value_s=1 / rates["values"],
    )


def _products(kernels: KernelSet, dtype: torch.dtype, cold_bytes: int) -> dict[int, Probe]:
    """Products of so many rows with weights that no cache holds."""
    weight = torch.randn(2 * SIDE, SIDE).to(dtype)
    count = max(2, cold_bytes // (weight.numel() * weight.element_size()))
    matrices = cycle([kernels.pack(weight.clone()) for _ in range(count)])  # not all sets of kernels copy
    return {rows: _product(kernels, matrices, rows, dtype) for rows in ROWS}


def _product(kernels: KernelSet, matrices: cycle[Matrix], rows: int, dtype: torch.dtype) -> Probe:
    x = torch.randn(rows, SIDE).to(dtype)
    return Probe(4 * rows * SIDE * SIDE, lambda: kernels.linear(x, next(matrices)))


def _layers_of_experts(kernels: KernelSet, dtype: torch.dtype, cold_bytes: int) -> list[ExpertWeights]:
    """At least two, with as many experts as there is room for, and weights that no cache holds."""
    hidden, inner = EXPERT_HIDDEN, EXPERT_INNER
    expert_bytes = 3 * hidden * inner * dtype.itemsize
    num = min(EXPERTS, max(1, cold_bytes // 2 // expert_bytes))
    gate_up, down = torch.randn(num, 2 * inner, hidden).to(dtype), torch.randn(num, hidden, inner).to(dtype)
    count = max(2, cold_bytes // (num * expert_bytes))
    return [kernels.pack_experts(gate_up.clone(), down.clone()) for _ in range(count)]


def _slices(whole: ExpertWeights) -> ExpertWeights:
    """The same memory as more experts of fewer inner columns: what the weights are does not matter here."""
    num, hidden, inner = whole.num_slots * SLICES, whole.hidden_size, whole.intermediate_size // SLICES
    assert isinstance(whole.gate_up, torch.Tensor)
    assert isinstance(whole.down, torch.Tensor)
    if whole.packed:
        gate_up, down = whole.gate_up.view(num, -1), whole.down.view(num, -1)
    else:
        gate_up, down = whole.gate_up.view(num, 2 * inner, hidden), whole.down.view(num, hidden, inner)
    return ExpertWeights(gate_up, down, num, hidden, inner, whole.packed)


def _experts(kernels: KernelSet, layers: Sequence[ExpertWeights], rows: int, dtype: torch.dtype) -> Probe:
    """Layers in turns, so many rows for each expert."""
    num, hidden, inner = layers[0].num_slots, layers[0].hidden_size, layers[0].intermediate_size
    x, starts = torch.randn(num * rows, hidden).to(dtype), torch.arange(0, num * rows + 1, rows)
    turns = cycle(layers)
    return Probe(6.0 * num * rows * hidden * inner, lambda: kernels.expert_mlp(x, starts, next(turns)))


def _decodes(kernels: KernelSet, dtype: torch.dtype, cold_bytes: int) -> dict[int, Probe]:
    """Bytes of KV, read by one query a sequence from blocks all over a cache, by query heads per KV head."""
    batch_bytes = SEQUENCES * CONTEXT * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
    batches, blocks = max(2, cold_bytes // batch_bytes), SEQUENCES * CONTEXT // BLOCK_SIZE
    caches = [torch.randn(batches * blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2)]
    tables = cycle(torch.randperm(batches * blocks).to(torch.int32).view(batches, SEQUENCES, -1).unbind())
    starts, used = _lengths(SEQUENCES, 1, CONTEXT)

    def decode(heads: int) -> Probe:
        query = torch.randn(SEQUENCES, KV_HEADS * heads, HEAD_DIM).to(dtype)
        return Probe(
            batch_bytes,
            lambda: kernels.attention(
                query, *caches, starts, 1, CONTEXT, scale=0.1, seqused_k=used, block_table=next(tables)
            ),
        )

    return {heads: decode(heads) for heads in QUERY_HEADS}


def _prompt(kernels: KernelSet, dtype: torch.dtype) -> Probe:
    """FLOPs of scores and values of whole prompts."""
    heads, blocks = 2 * KV_HEADS, PROMPTS * PROMPT // BLOCK_SIZE
    caches = [torch.randn(blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2)]
    table = torch.randperm(blocks).to(torch.int32).view(PROMPTS, -1)
    query = torch.randn(PROMPTS * PROMPT, heads, HEAD_DIM).to(dtype)
    starts, used = _lengths(PROMPTS, PROMPT, PROMPT)
    pairs = PROMPTS * PROMPT * (PROMPT + 1) / 2
    return Probe(
        pairs * 4 * heads * HEAD_DIM,
        lambda: kernels.attention(query, *caches, starts, PROMPT, PROMPT, scale=0.1, seqused_k=used, block_table=table),
    )


def _latent(kernels: KernelSet, dtype: torch.dtype) -> Probe:
    """FLOPs of decode over latents (MLA), which all heads read."""
    blocks = SEQUENCES * CONTEXT // BLOCK_SIZE
    cache = torch.randn(blocks, BLOCK_SIZE, LATENT_DIM).to(dtype)
    table = torch.randperm(blocks).to(torch.int32).view(SEQUENCES, -1)
    query = torch.randn(SEQUENCES, LATENT_HEADS, LATENT_DIM).to(dtype)
    starts, used = _lengths(SEQUENCES, 1, CONTEXT)
    lengths = {"seqused_k": used, "block_table": table}
    return Probe(
        SEQUENCES * CONTEXT * LATENT_HEADS * 2 * (LATENT_DIM + LATENT_VALUE_DIM),
        lambda: kernels.latent_attention(
            query, cache, starts, 1, CONTEXT, value_dim=LATENT_VALUE_DIM, scale=0.1, **lengths
        ),
    )


def _values(kernels: KernelSet, dtype: torch.dtype) -> Probe:
    """What a layer does beside products and attention, in values of the hidden states of its tokens.

    Two norms, rotation of half as many keys as queries, and the activation of an MLP three times as wide.
    """
    heads = HeadLayout(SIDE // HEAD_DIM, SIDE // HEAD_DIM // 2, HEAD_DIM)
    hidden, qkv = (torch.randn(TOKENS, width).to(dtype) for width in (SIDE, heads.qkv_size))
    residual, gate_up = torch.zeros_like(hidden), torch.randn(TOKENS, 6 * SIDE).to(dtype)
    caches = [torch.zeros(TOKENS, BLOCK_SIZE, heads.num_kv_heads, HEAD_DIM, dtype=dtype) for _ in range(2)]
    norm, head_norms = torch.ones(SIDE, dtype=dtype), (torch.ones(HEAD_DIM, dtype=dtype),) * 2
    positions, cos_sin = torch.arange(TOKENS), torch.zeros(TOKENS, HEAD_DIM)
    slots = positions * BLOCK_SIZE

    def call() -> None:
        for _ in range(2):
            kernels.add_rms_norm(hidden, residual, norm, 1e-6)
        kernels.rotate_and_cache(qkv, heads, head_norms, 1e-6, positions, cos_sin, *caches, slots)
        kernels.silu_and_mul(gate_up)

    return Probe(TOKENS * SIDE, call)


def _lengths(sequences: int, queries: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``cu_seqlens_q`` and ``seqused_k`` of equal sequences."""
    starts = torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32)
    return starts, torch.full((sequences,), context, dtype=torch.int32)
