"""Which checkpoint tensors a model has and how they are divided over ranks: the tables, in the hub's names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ridgewalk.placement.model_spec import ModelSpec


class Shard(str, Enum):
    """How a tensor is divided over tensor-parallel ranks."""

    REPLICATED = "replicated"  # every rank holds all of it
    COLUMN = "column"  # output features (dim 0) in equal parts
    KV_HEADS = "kv_heads"  # as COLUMN, but by KV heads, which are repeated when tp > num_kv_heads
    ROW = "row"  # input features (dim 1) in equal parts: the products are partial sums
    VOCAB = "vocab"  # rows in equal parts, the last one padded with zeros


class Precision(str, Enum):
    """The dtype that a parameter is held in."""

    COMPUTE = "compute"  # the compute dtype
    FLOAT32 = "float32"


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a checkpoint. Adjacent rules with the same parameter are stacked along dim 0, in their order.

    ``{expert}`` in the name stands for each routed expert: its parameter has one slot for each expert that a rank
    holds, and with expert parallelism an expert is not divided.
    """

    tensor: str
    parameter: str
    shape: tuple[str, ...]  # names of `tensor_sizes`
    shard: Shard = Shard.REPLICATED
    when: str = ""  # a flag of ModelSpec; without it, or when it is set, the tensor exists
    precision: Precision = Precision.COMPUTE

    @property
    def per_expert(self) -> bool:
        """Whether there is one such tensor for each routed expert."""
        return "{expert}" in self.tensor

    @property
    def may_stay_fp8(self) -> bool:
        """Whether the checkpoint's FP8 blocks can be multiplied as they are: of all projections but one.

        Tables and routers never are FP8, and ``kv_b`` is cut per head.
        """
        return len(self.shape) == 2 and self.parameter not in ("embedding", "head", "router", "kv_b")


EMBEDDING = TensorRule("model.embed_tokens.weight", "embedding", ("vocab", "hidden"), Shard.VOCAB)
NORM = TensorRule("model.norm.weight", "norm", ("hidden",))
HEAD = TensorRule("lm_head.weight", "head", ("vocab", "hidden"), Shard.VOCAB)

ATTENTION_NORM = TensorRule("input_layernorm.weight", "attention_norm", ("hidden",))
MLP_NORM = TensorRule("post_attention_layernorm.weight", "mlp_norm", ("hidden",))

GROUPED_QUERY = (
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
)

LATENT_QUERY = (TensorRule("self_attn.q_proj.weight", "q", ("q", "hidden"), Shard.COLUMN),)
LATENT_LORA_QUERY = (
    TensorRule("self_attn.q_a_proj.weight", "q_a", ("q_lora", "hidden")),
    TensorRule("self_attn.q_a_layernorm.weight", "q_a_norm", ("q_lora",)),
    TensorRule("self_attn.q_b_proj.weight", "q_b", ("q", "q_lora"), Shard.COLUMN),
)
LATENT = (
    TensorRule("self_attn.kv_a_proj_with_mqa.weight", "kv_a", ("latent", "hidden")),
    TensorRule("self_attn.kv_a_layernorm.weight", "kv_a_norm", ("kv_lora",)),
    TensorRule("self_attn.kv_b_proj.weight", "kv_b", ("kv_b", "kv_lora"), Shard.COLUMN),
    TensorRule("self_attn.o_proj.weight", "o", ("hidden", "values"), Shard.ROW),
)

DENSE_MLP = (
    TensorRule("mlp.gate_proj.weight", "gate_up", ("mlp", "hidden"), Shard.COLUMN),
    TensorRule("mlp.up_proj.weight", "gate_up", ("mlp", "hidden"), Shard.COLUMN),
    TensorRule("mlp.gate_proj.bias", "gate_up_bias", ("mlp",), Shard.COLUMN, "mlp_bias"),
    TensorRule("mlp.up_proj.bias", "gate_up_bias", ("mlp",), Shard.COLUMN, "mlp_bias"),
    TensorRule("mlp.down_proj.weight", "down", ("hidden", "mlp"), Shard.ROW),
    TensorRule("mlp.down_proj.bias", "down_bias", ("hidden",), when="mlp_bias"),
)

CORRECTION_BIAS = TensorRule(
    "mlp.gate.e_score_correction_bias", "router_bias", ("experts",), precision=Precision.FLOAT32
)
SHARED_EXPERTS = (
    TensorRule("mlp.shared_experts.gate_proj.weight", "shared_gate_up", ("shared", "hidden"), Shard.COLUMN),
    TensorRule("mlp.shared_experts.up_proj.weight", "shared_gate_up", ("shared", "hidden"), Shard.COLUMN),
    TensorRule("mlp.shared_experts.down_proj.weight", "shared_down", ("hidden", "shared"), Shard.ROW),
)


def _routed(block: str, gate: str, up: str, down: str, router: Precision) -> tuple[TensorRule, ...]:
    experts = f"{block}.experts.{{expert}}"
    return (
        TensorRule(f"{block}.gate.weight", "router", ("experts", "hidden"), precision=router),
        TensorRule(f"{experts}.{gate}.weight", "experts_gate_up", ("expert", "hidden"), Shard.COLUMN),
        TensorRule(f"{experts}.{up}.weight", "experts_gate_up", ("expert", "hidden"), Shard.COLUMN),
        TensorRule(f"{experts}.{down}.weight", "experts_down", ("hidden", "expert"), Shard.ROW),
    )


ROUTED_EXPERTS = {
    "mixtral": _routed("block_sparse_moe", "w1", "w3", "w2", Precision.COMPUTE),
    "qwen3_moe": _routed("mlp", "gate_proj", "up_proj", "down_proj", Precision.COMPUTE),
    "deepseek": _routed("mlp", "gate_proj", "up_proj", "down_proj", Precision.FLOAT32),
}
"""Router and routed experts by `MoESpec.names`. DeepSeek's routers compute in FP32, whatever the model does."""


def layer_rules(spec: ModelSpec, layer: int) -> tuple[TensorRule, ...]:
    """Tensors of one decoder layer, named without ``model.layers.N.``."""
    rules = (ATTENTION_NORM, *_attention_rules(spec), MLP_NORM, *_mlp_rules(spec, layer))
    return tuple(rule for rule in rules if not rule.when or getattr(spec, rule.when))


def tensor_sizes(spec: ModelSpec) -> dict[str, int]:
    """The sizes that rules name, of the whole model."""
    sizes = {
        "vocab": spec.vocab_size,
        "hidden": spec.hidden_size,
        "mlp": spec.intermediate_size,
        "head": spec.head_dim,
        "q": spec.num_heads * spec.head_dim,
        "kv": spec.num_kv_heads * spec.head_dim,
    }
    if mla := spec.mla:
        sizes |= {
            "q": spec.num_heads * mla.qk_head_dim,
            "q_lora": mla.q_lora_rank,
            "latent": mla.latent_dim,
            "kv_lora": mla.kv_lora_rank,
            "kv_b": spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim),
            "values": spec.num_heads * mla.v_head_dim,
        }
    if moe := spec.moe:
        sizes |= {
            "experts": moe.num_experts,
            "expert": moe.intermediate_size,
            "shared": moe.shared_intermediate_size,
        }
    return sizes


def checkpoint_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a checkpoint of this model holds, by name; scales of quantized ones left out."""
    sizes = tensor_sizes(spec)
    head = () if spec.tie_word_embeddings else (HEAD,)
    shapes = {rule.tensor: tuple(sizes[name] for name in rule.shape) for rule in (EMBEDDING, NORM, *head)}
    for layer in range(spec.num_layers):
        for rule in layer_rules(spec, layer):
            shape = tuple(sizes[name] for name in rule.shape)
            experts = range(sizes["experts"]) if rule.per_expert else range(1)
            shapes |= {f"model.layers.{layer}.{rule.tensor.format(expert=expert)}": shape for expert in experts}
    return shapes


def _attention_rules(spec: ModelSpec) -> tuple[TensorRule, ...]:
    if spec.mla is None:
        return GROUPED_QUERY
    return (*(LATENT_LORA_QUERY if spec.mla.q_lora_rank else LATENT_QUERY), *LATENT)


def _mlp_rules(spec: ModelSpec, layer: int) -> tuple[TensorRule, ...]:
    if spec.moe is None or not spec.is_sparse(layer):
        return DENSE_MLP
    bias = (CORRECTION_BIAS,) if spec.moe.correction_bias else ()
    shared = SHARED_EXPERTS if spec.moe.shared_intermediate_size else ()
    return (*ROUTED_EXPERTS[spec.moe.names], *bias, *shared)
