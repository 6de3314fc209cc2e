"""Memory of one step beside weights and KV cache: an upper bound, in bytes of one rank of a stage."""

from __future__ import annotations

from dataclasses import dataclass

from ridgewalk.placement.fp8_weights import FP8_BYTES, kept_block
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.placement.moe_spec import MoESpec
from ridgewalk.placement.stages import stage_layers
from ridgewalk.placement.weights import DTYPE_BYTES, FP32_BYTES

EXPERT_ROWS = 16384
"""Rows that go through the experts at once, as the kernels have it (`ridgewalk.kernels.torch_experts.ROW_BLOCK`)."""

FP8_SCRATCH = 2**23
"""Values that a product with FP8 weights converts at once (`ridgewalk.kernels.block_scales.SCRATCH_VALUES`)."""

INDEX_BYTES = 8


@dataclass(frozen=True)
class StepLimits:
    """The largest step of an attention group, and the length that tables are made for."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int


def activation_bytes(
    spec: ModelSpec,
    mesh: Mesh,
    dtype: str,
    limits: StepLimits,
    num_redundant_experts: int = 0,
    keeps_fp8: bool = False,
) -> tuple[int, ...]:
    """Bytes on one rank of each stage: hidden states, attention and the larger of dense and sparse MLP.

    On the last stage, per sequence: logits of the whole vocabulary in the compute dtype and three times in FP32
    (sampling). In a pipeline: what is received and what is sent on. Tables: cos and sin in FP32.
    Where weights are kept in FP8, a product converts `FP8_SCRATCH` values at once: weights to FP32 and on to the
    compute dtype, or inputs padded, in FP32, scaled and in FP8; either way with as many outputs.
    """
    size, tokens = DTYPE_BYTES[dtype], limits.max_num_batched_tokens
    stages = stage_layers(spec, mesh.pp)
    hidden = tokens * spec.hidden_size * size
    tables = limits.max_model_len * spec.head_dim * FP32_BYTES
    attention = tokens * _attention_values(spec, mesh.tp) * size
    dense = tokens * 3 * (spec.intermediate_size // mesh.tp) * size
    sparse = _sparse_bytes(spec, spec.moe, mesh, size, tokens, num_redundant_experts) if spec.moe else 0
    logits = limits.max_num_seqs * spec.vocab_size * (2 * size + 3 * FP32_BYTES)
    common = 4 * hidden + attention + tables + (2 * hidden if mesh.pp > 1 else 0)
    if kept_block(spec, keeps_fp8):
        common += FP8_SCRATCH * (2 * size + 2 * FP32_BYTES + FP8_BYTES)
    return tuple(
        common
        + max(sparse if spec.is_sparse(layer) else dense for layer in layers)
        + (logits if layers is stages[-1] else 0)
        for layers in stages
    )


def _attention_values(spec: ModelSpec, tp: int) -> int:
    """Values per token: q, k, v and the output; with latent attention the latents, and queries and output twice.

    A head's query is there as projected and, as wide as the latent, absorbed; its output as read from the latents and
    as values.
    """
    heads = spec.num_heads_per_rank(tp)
    mla = spec.mla
    if mla is None:
        return 2 * (heads + spec.num_kv_heads_per_rank(tp)) * spec.head_dim
    queries = mla.qk_head_dim + 2 * mla.latent_dim
    return mla.q_lora_rank + mla.latent_dim + heads * (queries + mla.kv_lora_rank + mla.v_head_dim)


def _sparse_bytes(spec: ModelSpec, moe: MoESpec, mesh: Mesh, size: int, tokens: int, num_redundant_experts: int) -> int:
    """A mixture of experts, dispatch included.

    No router can overflow it: with expert parallelism it has room for every choice of every token of all attention
    groups that this rank's experts can meet, which is ``dp * tokens * min(top_k, slots)`` rows.
    """
    ep = mesh.dp * mesh.tp if mesh.expert_parallel else 1
    routed = -(-tokens // mesh.tp) if ep > 1 else tokens  # a tensor-parallel rank dispatches its share
    sent = routed * moe.top_k
    slots = moe.slots_per_rank(ep, num_redundant_experts)
    arrived = mesh.dp * tokens * min(moe.top_k, slots) if ep > 1 else sent
    inner = moe.intermediate_size // (1 if mesh.expert_parallel else mesh.tp)
    row = spec.hidden_size * size
    # In FP32 the router's input, and per expert logits, scores, biased, masked and sorted ones, and their order.
    router = routed * (spec.hidden_size * FP32_BYTES + moe.num_experts * (5 * FP32_BYTES + INDEX_BYTES))
    # Rows that leave, those that come back, their order by token; then sums in FP32.
    way = 3 * sent * (row + size + 2 * INDEX_BYTES) + 3 * routed * spec.hidden_size * FP32_BYTES
    # Rows that arrive and their results, then those that are in the experts: input, gate and up, activated, output.
    at_home = 2 * arrived * (row + size + 2 * INDEX_BYTES) if ep > 1 else 0
    within = min(arrived, EXPERT_ROWS) * (2 * row + 4 * inner * size)
    shared = tokens * 3 * (moe.shared_intermediate_size // mesh.tp) * size
    return router + way + at_home + within + shared
