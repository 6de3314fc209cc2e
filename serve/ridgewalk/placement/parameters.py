"""Parameters of the parts of a layer, as one tensor-parallel rank holds them. Counts, not bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ridgewalk.placement.mesh import Mesh

if TYPE_CHECKING:
    from ridgewalk.placement.model_spec import ModelSpec


def attention_parameters(spec: ModelSpec, tp: int) -> int:
    """Attention with its projections, and the layer's two norms, which are on every rank."""
    if spec.mla:
        others = spec.mla.q_lora_rank + spec.mla.kv_lora_rank
    else:
        q_size, kv_size = _head_sizes(spec, tp)
        biases = spec.qkv_bias * (q_size + 2 * kv_size) + spec.o_bias * spec.hidden_size
        others = biases + spec.qk_norm * 2 * spec.head_dim
    return attention_matrices(spec, tp) + others + 2 * spec.hidden_size


def attention_matrices(spec: ModelSpec, tp: int) -> int:
    """The projections of attention alone.

    Of latent attention, those down to the latents are whole on every rank, those up from them are sharded by heads.
    """
    mla, hidden = spec.mla, spec.hidden_size
    if mla is None:
        q_size, kv_size = _head_sizes(spec, tp)
        return hidden * (2 * q_size + 2 * kv_size)
    heads = spec.num_heads_per_rank(tp)
    down = hidden * (mla.q_lora_rank + mla.latent_dim)
    queries = (mla.q_lora_rank or hidden) * mla.qk_head_dim
    keys_and_values = mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
    return down + heads * (queries + keys_and_values + mla.v_head_dim * hidden)


def dense_parameters(spec: ModelSpec, tp: int) -> int:
    """The MLP of a dense layer."""
    size = spec.intermediate_size // tp
    return 3 * size * spec.hidden_size + spec.mlp_bias * (2 * size + spec.hidden_size)


def sparse_parameters(spec: ModelSpec, mesh: Mesh, num_redundant_experts: int) -> int:
    """The MLP of a sparse layer, without `wide_router_parameters`.

    With expert parallelism a rank holds whole experts, else a slice of each.
    """
    if spec.moe is None:
        return 0
    if mesh.expert_parallel:
        slots = spec.moe.slots_per_rank(mesh.dp * mesh.tp, num_redundant_experts)
        experts = slots * expert_parameters(spec)
    else:
        experts = spec.moe.num_experts * expert_parameters(spec, mesh.tp)
    router = 0 if wide_router_parameters(spec) else router_parameters(spec)
    return experts + shared_parameters(spec, mesh.tp) + router


def expert_parameters(spec: ModelSpec, tp: int = 1) -> int:
    """One routed expert, or its slice."""
    return 3 * spec.hidden_size * (spec.moe.intermediate_size // tp) if spec.moe else 0


def shared_parameters(spec: ModelSpec, tp: int) -> int:
    """The shared experts of a sparse layer: sharded over tp, with expert parallelism too."""
    return 3 * spec.hidden_size * (spec.moe.shared_intermediate_size // tp) if spec.moe else 0


def router_parameters(spec: ModelSpec) -> int:
    """The router of a sparse layer without its bias: on every rank."""
    return spec.moe.num_experts * spec.hidden_size if spec.moe else 0


def wide_router_parameters(spec: ModelSpec) -> int:
    """The router of a sparse layer where it computes in FP32, which DeepSeek's does, with its correction bias."""
    if spec.moe is None or spec.moe.names != "deepseek":
        return 0
    return router_parameters(spec) + spec.moe.correction_bias * spec.moe.num_experts


def passed_parameters(spec: ModelSpec, layer: int) -> int:
    """Weights of the matrix products that one token passes in a layer: of the experts only those it chooses."""
    if not spec.is_sparse(layer) or spec.moe is None:
        return attention_matrices(spec, 1) + 3 * spec.hidden_size * spec.intermediate_size
    experts = spec.moe.top_k * expert_parameters(spec) + shared_parameters(spec, 1)
    return attention_matrices(spec, 1) + experts + router_parameters(spec)


def _head_sizes(spec: ModelSpec, tp: int) -> tuple[int, int]:
    """Values of one token's queries, and of its keys or values, on one rank."""
    return spec.num_heads_per_rank(tp) * spec.head_dim, spec.num_kv_heads_per_rank(tp) * spec.head_dim
