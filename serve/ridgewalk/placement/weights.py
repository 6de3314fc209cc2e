"""What the ranks of each pipeline stage hold: parameters, bytes of weights, bytes of KV cache.

All ranks of a stage hold the same amount, so figures are of one rank of each stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ridgewalk.placement import parameters
from ridgewalk.placement.fp8_weights import FP8_BYTES, kept_block, kept_in_fp8, mlp_matrices
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.stages import stage_layers

if TYPE_CHECKING:
    from ridgewalk.placement.model_spec import ModelSpec

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one element, by the names that configs use."""

FP32_BYTES = 4


@dataclass(frozen=True)
class StageWeights:
    """Parameters that one rank of a stage holds."""

    tables: int  # embeddings and heads: on the first and the last stage
    vocab_rows: int  # rows of one table, the last shard padded
    layers: int  # everything else that is held in the compute dtype or in FP8
    wide: int  # held in FP32 whatever the compute dtype: what DeepSeek's routers compute with
    in_fp8: int  # of the layers' parameters, those kept in FP8
    scales: int  # of these; no parameters themselves

    def num_parameters(self, hidden_size: int) -> int:
        """All of them, padding rows included."""
        return self.tables * self.vocab_rows * hidden_size + self.layers + self.wide


def stage_weights(
    spec: ModelSpec, mesh: Mesh, num_redundant_experts: int = 0, keeps_fp8: bool = False
) -> tuple[StageWeights, ...]:
    """What one rank of each stage holds. A tied embedding is held once where first and last stage are the same.

    ``keeps_fp8``: the ranks' devices multiply FP8, so that they keep what `kept_in_fp8` says.
    """
    stages, block = stage_layers(spec, mesh.pp), kept_block(spec, keeps_fp8)
    weights = []
    for index, layers in enumerate(stages):
        first, last = index == 0, index == len(stages) - 1
        tables = 1 if first and last and spec.tie_word_embeddings else first + last
        sparse = sum(spec.is_sparse(layer) for layer in layers)
        held = len(layers) * parameters.attention_parameters(spec, mesh.tp)
        held += (len(layers) - sparse) * parameters.dense_parameters(spec, mesh.tp)
        held += sparse * parameters.sparse_parameters(spec, mesh, num_redundant_experts)
        held += last * spec.hidden_size
        wide = sparse * parameters.wide_router_parameters(spec)
        kept = [kept_in_fp8(spec, mesh, layer, block, num_redundant_experts) for layer in layers] if block else []
        in_fp8, scales = sum(values for values, _ in kept), sum(scales for _, scales in kept)
        weights.append(StageWeights(tables, spec.vocab_size_per_rank(mesh.tp), held, wide, in_fp8, scales))
    return tuple(weights)


def held_bytes(spec: ModelSpec, weights: StageWeights, dtype: str) -> int:
    """Bytes that a rank really holds for these weights when the model computes in ``dtype``.

    What is not kept in FP8 is dequantized as it is read, so that it takes the compute dtype's bytes.
    """
    size = DTYPE_BYTES[dtype]
    tables = weights.tables * weights.vocab_rows * spec.hidden_size
    in_fp8 = weights.in_fp8 * FP8_BYTES + weights.scales * FP32_BYTES
    return (tables + weights.layers - weights.in_fp8) * size + in_fp8 + weights.wide * FP32_BYTES


def replica_bytes(
    spec: ModelSpec, mesh: Mesh, dtype: str, num_redundant_experts: int = 0, keeps_fp8: bool = False
) -> int:
    """Bytes of weights on all ranks together, without the rows that pad the vocabulary: they are copies of nothing."""
    padded_rows = spec.vocab_size_per_rank(mesh.tp) * mesh.tp - spec.vocab_size
    stages = stage_weights(spec, mesh, num_redundant_experts, keeps_fp8)
    held = sum(held_bytes(spec, weights, dtype) for weights in stages) * mesh.tp
    padding = sum(weights.tables for weights in stages) * padded_rows * spec.hidden_size * DTYPE_BYTES[dtype]
    return (held - padding) * mesh.dp


def expert_bytes(spec: ModelSpec, mesh: Mesh, dtype: str, keeps_fp8: bool = False) -> int:
    """Bytes of one routed expert, on all ranks that it is divided over."""
    if spec.moe is None:
        return 0
    block, slices = kept_block(spec, keeps_fp8), 1 if mesh.expert_parallel else mesh.tp
    per_rank = 0
    for matrices in mlp_matrices(spec.moe.intermediate_size, spec.hidden_size, slices):
        if block and matrices.keeps(block):
            per_rank += matrices.num_parameters * FP8_BYTES + matrices.num_scales(block) * FP32_BYTES
        else:
            per_rank += matrices.num_parameters * DTYPE_BYTES[dtype]
    return per_rank * slices


def kv_values_per_layer(spec: ModelSpec, tp: int) -> int:
    """Values that one token keeps in one layer on one rank: keys and values of its heads, or the whole latent."""
    return spec.mla.latent_dim if spec.mla else 2 * spec.num_kv_heads_per_rank(tp) * spec.head_dim
