"""How a checkpoint is divided over tensor-parallel ranks, as data: which slice of which tensor goes where."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ridgewalk.placement.model_spec import ModelSpec


class Shard(str, Enum):
    """How a tensor is divided."""

    REPLICATED = "replicated"  # every rank holds all of it
    COLUMN = "column"  # output features (dim 0) in equal parts
    KV_HEADS = "kv_heads"  # as COLUMN, but by KV heads, which are repeated when tp > num_kv_heads
    ROW = "row"  # input features (dim 1) in equal parts: the products are partial sums
    VOCAB = "vocab"  # rows in equal parts, the last one padded with zeros


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a checkpoint. Several rules with the same parameter are stacked along dim 0, in their order."""

    tensor: str
    parameter: str
    shape: tuple[str, ...]  # names of sizes, see `_sizes`
    shard: Shard = Shard.REPLICATED
    when: str = ""  # a flag of ModelSpec; without it, or when it is set, the tensor exists


LAYER_RULES = (
    TensorRule("input_layernorm.weight", "attention_norm", ("hidden",)),
    TensorRule("self_attn.q_proj.weight", "qkv", ("q", "hidden"), Shard.COLUMN),
    TensorRule("self_attn.k_proj.weight", "qkv", ("kv", "hidden"), Shard.KV_HEADS),
    TensorRule("self_attn.v_proj.weight", "qkv", ("kv", "hidden"), Shard.KV_HEADS),
    TensorRule("self_attn.q_proj.bias", "qkv_bias", ("q",), Shard.COLUMN, "qkv_bias"),
    TensorRule("self_attn.k_proj.bias", "qkv_bias", ("kv",), Shard.KV_HEADS, "qkv_bias"),
    TensorRule("self_attn.v_proj.bias", "qkv_bias", ("kv",), Shard.KV_HEADS, "qkv_bias"),
    TensorRule("self_attn.q_norm.weight", "q_norm", ("head",), when="qk_norm"),
    TensorRule("self_attn.k_norm.weight", "k_norm", ("head",), when="qk_norm"),
    TensorRule("self_attn.o_proj.weight", "o", ("hidden", "q"), Shard.ROW),
    TensorRule("self_attn.o_proj.bias", "o_bias", ("hidden",), when="o_bias"),
    TensorRule("post_attention_layernorm.weight", "mlp_norm", ("hidden",)),
    TensorRule("mlp.gate_proj.weight", "gate_up", ("mlp", "hidden"), Shard.COLUMN),
    TensorRule("mlp.up_proj.weight", "gate_up", ("mlp", "hidden"), Shard.COLUMN),
    TensorRule("mlp.gate_proj.bias", "gate_up_bias", ("mlp",), Shard.COLUMN, "mlp_bias"),
    TensorRule("mlp.up_proj.bias", "gate_up_bias", ("mlp",), Shard.COLUMN, "mlp_bias"),
    TensorRule("mlp.down_proj.weight", "down", ("hidden", "mlp"), Shard.ROW),
    TensorRule("mlp.down_proj.bias", "down_bias", ("hidden",), when="mlp_bias"),
)
"""Tensors of one decoder layer (``model.layers.N.``)."""

MODEL_RULES = (
    TensorRule("model.embed_tokens.weight", "embedding", ("vocab", "hidden"), Shard.VOCAB),
    TensorRule("model.norm.weight", "norm", ("hidden",)),
    TensorRule("lm_head.weight", "head", ("vocab", "hidden"), Shard.VOCAB, "untied"),
)
"""Tensors outside the layers."""


@dataclass(frozen=True)
class TensorSlice:
    """A run of a checkpoint tensor and where it lands in a parameter."""

    tensor: str
    shape: tuple[int, ...]  # of the whole tensor
    dim: int  # the axis that is sliced, in the tensor and in the parameter
    start: int
    stop: int
    offset: int  # index along `dim` of the parameter where the run begins


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model on one rank. What no slice covers is zero (the padding of the vocabulary)."""

    shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]


def shard_plan(spec: ModelSpec, tp: int, tp_rank: int) -> dict[str, Parameter]:
    """Parameters of one rank by name: ``embedding``, ``layers.N.qkv`` ..."""
    sizes = _sizes(spec)
    plan: dict[str, Parameter] = {}
    rules = [("", "", rule) for rule in MODEL_RULES]
    for layer in range(spec.num_layers):
        rules += [(f"model.layers.{layer}.", f"layers.{layer}.", rule) for rule in LAYER_RULES]
    for tensor_prefix, prefix, rule in rules:
        if not _exists(spec, rule.when):
            continue
        shape = tuple(sizes[name] for name in rule.shape)
        dim = 1 if rule.shard is Shard.ROW else 0
        start, stop, length = _part(spec, rule.shard, shape[dim], tp, tp_rank)
        before = plan.get(prefix + rule.parameter)
        offset = before.shape[0] if before else 0
        piece = TensorSlice(tensor_prefix + rule.tensor, shape, dim, start, stop, offset)
        whole = (*shape[:dim], offset + length, *shape[dim + 1 :])
        plan[prefix + rule.parameter] = Parameter(whole, (*(before.slices if before else ()), piece))
    return plan


def _sizes(spec: ModelSpec) -> dict[str, int]:
    return {
        "vocab": spec.vocab_size,
        "hidden": spec.hidden_size,
        "head": spec.head_dim,
        "q": spec.num_heads * spec.head_dim,
        "kv": spec.num_kv_heads * spec.head_dim,
        "mlp": spec.intermediate_size,
    }


def _exists(spec: ModelSpec, when: str) -> bool:
    if when == "untied":
        return not spec.tie_word_embeddings
    return not when or bool(getattr(spec, when))


def _part(spec: ModelSpec, shard: Shard, size: int, tp: int, rank: int) -> tuple[int, int, int]:
    """``(start, stop, length)`` of a rank's part of an axis; length exceeds ``stop - start`` where it is padded."""
    if shard is Shard.REPLICATED:
        return 0, size, size
    if shard is Shard.VOCAB:
        length = spec.vocab_size_per_rank(tp)
        return min(rank * length, size), min((rank + 1) * length, size), length
    if shard is Shard.KV_HEADS and tp > spec.num_kv_heads:
        head = rank * spec.num_kv_heads // tp  # ranks whose queries use this head hold the same copy
        return head * spec.head_dim, (head + 1) * spec.head_dim, spec.head_dim
    length = size // tp
    return rank * length, (rank + 1) * length, length
