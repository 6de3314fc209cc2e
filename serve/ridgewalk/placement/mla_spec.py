"""Multi-head latent attention (arXiv 2405.04434, section 2.1): its sizes, read from a DeepSeek config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ridgewalk.placement.config_fields import natural, real, whole
from ridgewalk.placement.rope_spec import RopeSpec, yarn_mscale


@dataclass(frozen=True)
class MLASpec:
    """Sizes of latent attention. The cache holds one latent and one rope key per token, shared by all heads."""

    q_lora_rank: int  # 0: queries are projected in one step
    kv_lora_rank: int
    qk_nope_head_dim: int  # of each head's query and key: the part without position
    qk_rope_head_dim: int  # the part that is rotated
    v_head_dim: int
    softmax_scale: float
    rope_interleave: bool  # pairs (2i, 2i + 1) are rotated, else (i, i + half)
    norm_eps: float = 1e-6  # of the norms of the two latents: not `rms_norm_eps`, as transformers has it

    @property
    def qk_head_dim(self) -> int:
        """Size of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values that one token keeps in one layer's cache: the latent and the rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any], rope: RopeSpec, interleave: bool) -> MLASpec:
        """Read a DeepSeek config; ``interleave`` is the rope layout where the config does not say.

        Raises:
            ValueError: a field is missing or no size, or projections with biases, which are not built.
        """
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError("attention_bias and mlp_bias are not supported with latent attention")
        nope, rotated = whole(config, "qk_nope_head_dim"), whole(config, "qk_rope_head_dim")
        return cls(
            q_lora_rank=natural(config, "q_lora_rank", 1536),
            kv_lora_rank=whole(config, "kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rotated,
            v_head_dim=whole(config, "v_head_dim"),
            softmax_scale=_softmax_scale(config, rope, nope + rotated),
            rope_interleave=bool(config.get("rope_interleave", interleave)),
        )


def _softmax_scale(config: Mapping[str, Any], rope: RopeSpec, qk_head_dim: int) -> float:
    """``qk_head_dim ** -0.5``, times YaRN's temperature squared: transformers' ``yarn_apply_mscale``."""
    scale = float(qk_head_dim**-0.5)
    fields = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    weight = real(fields, "mscale_all_dim", 0.0)
    if rope.rope_type == "default" or not weight:
        return scale
    mscale = yarn_mscale(rope.factor, weight)
    return scale * mscale * mscale
