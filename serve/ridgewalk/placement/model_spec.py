"""`ModelSpec`: the one description of a model. The planner computes with it and the ranks build the model from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ridgewalk.placement import weights
from ridgewalk.placement.config_fields import fp8_block, fp8_complete, real, token_ids, whole
from ridgewalk.placement.families import FAMILIES, architecture_of, refuse_unbuilt
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.mesh_fit import mesh_problem
from ridgewalk.placement.mla_spec import MLASpec
from ridgewalk.placement.moe_spec import MoESpec
from ridgewalk.placement.parameters import expert_parameters, passed_parameters
from ridgewalk.placement.rope_spec import RopeSpec
from ridgewalk.placement.stages import stage_layers
from ridgewalk.placement.weights import DTYPE_BYTES


class UnsupportedModelError(ValueError):
    """Ridgewalk does not serve this model, or not on this mesh; the message says why in a sentence."""


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder: grouped-query or latent attention, and in each layer one MLP or a mixture of experts."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # with latent attention: num_heads
    head_dim: int  # of the rotary table; with latent attention qk_rope_head_dim
    intermediate_size: int  # of dense layers
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"  # of the checkpoint's weights that are not FP8
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    mla: MLASpec | None = None  # None: grouped-query attention
    moe: MoESpec | None = None  # None: all layers are dense
    fp8_block: tuple[int, int] | None = None  # rows, columns that share a scale in an FP8 checkpoint
    fp8_complete: bool = True  # all projections of that checkpoint are FP8

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a Hugging Face ``config.json`` (already parsed).

        Layers for multi-token prediction (``num_nextn_predict_layers``) are not part of the model.

        Raises:
            UnsupportedModelError: the architecture or a feature of it is not built, or a field is missing.
        """
        try:
            architecture = architecture_of(config)
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from error
        try:
            return cls._read(config, architecture)
        except ValueError as error:
            raise UnsupportedModelError(f"{architecture}: {error}") from error

    @classmethod
    def _read(cls, config: Mapping[str, Any], architecture: str) -> ModelSpec:
        family = FAMILIES[architecture]
        refuse_unbuilt(config, family)
        hidden_size, num_heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
        max_position_embeddings = whole(config, "max_position_embeddings")
        rope = RopeSpec.from_config(config, max_position_embeddings, family.rope_theta)
        mla = MLASpec.from_config(config, rope, family.rope_interleave) if family.latent_attention else None
        attention_bias = family.attention_bias_field and bool(config.get("attention_bias", False))
        head_dim = mla.qk_rope_head_dim if mla else int(config.get("head_dim") or hidden_size // num_heads)
        return cls(
            architecture=architecture,
            vocab_size=whole(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=whole(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads if mla else int(config.get("num_key_value_heads") or num_heads),
            head_dim=head_dim,
            intermediate_size=whole(config, "intermediate_size"),
            rms_norm_eps=real(config, "rms_norm_eps", family.rms_norm_eps),
            rope=rope,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family.mlp_bias_field and bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            dtype=_dtype(config),
            eos_token_ids=token_ids(config.get("eos_token_id")),
            bos_token_id=config.get("bos_token_id"),
            mla=mla,
            moe=family.read_moe(config) if family.read_moe else None,
            fp8_block=fp8_block(config),
            fp8_complete=fp8_complete(config),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelSpec:
        """Read ``config.json`` of a model folder; the end-of-sequence tokens of ``generation_config.json`` are added.

        Raises:
            UnsupportedModelError: as `from_config`; also when the folder has no readable ``config.json``.
        """
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"{folder} has no readable config.json: {error}") from error
        generation = Path(folder) / "generation_config.json"
        if generation.exists():
            more = token_ids(json.loads(generation.read_text()).get("eos_token_id"))
            known = token_ids(config.get("eos_token_id"))
            config["eos_token_id"] = [*known, *(token for token in more if token not in known)]
        return cls.from_config(config)

    # Layers, and the shapes of one rank's shard

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.moe is not None and layer in self.moe.sparse_layers

    def num_heads_per_rank(self, tp: int) -> int:
        """Query heads of one tensor-parallel rank."""
        return self.num_heads // tp

    def num_kv_heads_per_rank(self, tp: int) -> int:
        """KV heads of one tensor-parallel rank: at least one, so that heads are repeated when ``tp > num_kv_heads``."""
        return max(1, self.num_kv_heads // tp)

    def vocab_size_per_rank(self, tp: int) -> int:
        """Rows of the embedding held by one rank; the last shard is padded when tp does not divide the vocabulary."""
        return math.ceil(self.vocab_size / tp)

    # Parameters and bytes of weights

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied embeddings counted once."""
        return self.num_parameters_per_rank(Mesh())

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes: all but the experts that it does not choose."""
        if self.moe is None:
            return self.num_parameters
        idle = (self.moe.num_experts - self.moe.top_k) * len(self.moe.sparse_layers)
        return self.num_parameters - idle * expert_parameters(self)

    def num_parameters_per_rank(self, mesh: Mesh, num_redundant_experts: int = 0) -> int:
        """Parameters on a rank of the stage that holds most: sharded ones by its share, the others in full."""
        stages = weights.stage_weights(self, mesh, num_redundant_experts)
        return max(stage.num_parameters(self.hidden_size) for stage in stages)

    def weight_bytes_per_stage(
        self, mesh: Mesh, dtype: str, num_redundant_experts: int = 0, keeps_fp8: bool = False
    ) -> tuple[int, ...]:
        """Bytes of weights on one rank of each stage, as they are really held.

        ``keeps_fp8``: the ranks' devices multiply FP8, so that what consists of whole blocks stays in it.
        """
        stages = weights.stage_weights(self, mesh, num_redundant_experts, keeps_fp8)
        return tuple(weights.held_bytes(self, stage, dtype) for stage in stages)

    def weight_bytes_per_rank(
        self, mesh: Mesh, dtype: str, num_redundant_experts: int = 0, keeps_fp8: bool = False
    ) -> int:
        """Bytes of weights on the heaviest rank."""
        return max(self.weight_bytes_per_stage(mesh, dtype, num_redundant_experts, keeps_fp8))

    def weight_bytes_of_replica(
        self, mesh: Mesh, dtype: str, num_redundant_experts: int = 0, keeps_fp8: bool = False
    ) -> int:
        """Bytes of weights on all ranks together; rows that pad the vocabulary are copies of nothing: left out."""
        return weights.replica_bytes(self, mesh, dtype, num_redundant_experts, keeps_fp8)

    # KV cache and arithmetic

    def kv_bytes_per_token_per_stage(self, mesh: Mesh, dtype: str) -> tuple[int, ...]:
        """Bytes of KV cache that one token takes on one rank of each stage: all layers of the stage.

        Keys and values of the rank's heads; with latent attention the whole latent, which tp repeats on every rank.
        """
        values = weights.kv_values_per_layer(self, mesh.tp)
        return tuple(len(layers) * values * DTYPE_BYTES[dtype] for layers in stage_layers(self, mesh.pp))

    def kv_bytes_per_token(self, mesh: Mesh, dtype: str) -> int:
        """Bytes of KV cache that one token takes on a rank of the stage with most layers."""
        return max(self.kv_bytes_per_token_per_stage(mesh, dtype))

    def flops_per_token(self, context_len: int = 0) -> int:
        """FLOPs of one token through the whole model at one context length.

        2 per weight of every matrix product that the token passes (the head and only the experts it chooses; not the
        embedding look-up), and 4 per layer, head dimension and cached token for scores and values (arXiv 2001.08361,
        section 2.1). Latent attention decodes on the latents: scores are as wide as the latent and the rope key,
        values as the latent.
        """
        per_position = 4 * self.num_heads * self.head_dim
        if self.mla:
            per_position = 2 * self.num_heads * (self.mla.latent_dim + self.mla.kv_lora_rank)
        layers = sum(passed_parameters(self, layer) for layer in range(self.num_layers))
        head = self.vocab_size * self.hidden_size
        return 2 * (layers + head) + self.num_layers * per_position * context_len


def validate_mesh(spec: ModelSpec, mesh: Mesh, num_redundant_experts: int = 0) -> None:
    """Check that the model can be sharded over the mesh.

    Raises:
        UnsupportedModelError: one sentence naming what does not divide or fit, and the remedy.
    """
    problem = mesh_problem(spec, mesh, num_redundant_experts)
    if problem:
        raise UnsupportedModelError(problem)


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ValueError(f"dtype {name!r} is not supported (supported: {', '.join(DTYPE_BYTES)})")
    return name
