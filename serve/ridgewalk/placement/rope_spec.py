"""How a model rotates its queries and keys: the parameters of rotary position embeddings, read from a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ridgewalk.placement.config_fields import real

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that are built, in the names of Hugging Face configs."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding (arXiv 2104.09864) with the scalings of Hugging Face's `modeling_rope_utils`.

    `ridgewalk.model.rope` builds the tables from these fields; fields that a kind does not use keep their defaults.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0  # linear, llama3, yarn: the context grows by this
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 0  # llama3, yarn: context length of the pretraining
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: correction range rounded to whole dimensions
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], max_position_embeddings: int, default_theta: float = 10000.0
    ) -> RopeSpec:
        """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (older configs).

        Raises:
            ValueError: the kind is not one of `ROPE_TYPES`, only part of each head is rotated, or a field is missing
                or no number.
        """
        fields: dict[str, Any] = dict(config.get("rope_scaling") or {})
        fields.update(config.get("rope_parameters") or {})
        rope_type = str(fields.get("rope_type") or fields.get("type") or "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
        rotary_share = real(fields, "partial_rotary_factor", real(config, "partial_rotary_factor", 1.0))
        if rotary_share != 1.0:
            raise ValueError(f"partial_rotary_factor {rotary_share} is not supported (only 1.0 is)")
        theta = real(fields, "rope_theta", real(config, "rope_theta", default_theta)) or default_theta
        original = int(fields.get("original_max_position_embeddings") or max_position_embeddings)
        if rope_type == "default":
            return cls(theta=theta)
        needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        missing = [name for name in needed.get(rope_type, ()) if fields.get(name) is None]
        if missing:
            raise ValueError(f"rope type {rope_type!r} needs the field {missing[0]!r}")
        factor = real(fields, "factor", max_position_embeddings / original)
        if not factor:
            raise ValueError(f"rope type {rope_type!r} needs a factor over 0")
        if rope_type == "linear":
            return cls(rope_type, theta, factor)
        if rope_type == "llama3":
            low, high = real(fields, "low_freq_factor", 1.0), real(fields, "high_freq_factor", 4.0)
            return cls(rope_type, theta, factor, low, high, original)
        return cls(
            rope_type,
            theta,
            factor,
            original_max_position_embeddings=original,
            beta_fast=real(fields, "beta_fast", 32.0) or 32.0,
            beta_slow=real(fields, "beta_slow", 1.0) or 1.0,
            truncate=bool(fields.get("truncate", True)),
            attention_factor=_yarn_attention_factor(fields, factor),
        )


def yarn_mscale(factor: float, weight: float) -> float:
    """Temperature of YaRN (arXiv 2309.00071, section 3.4) for a context grown by ``factor``, as DeepSeek weighs it."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention_factor(fields: Mapping[str, Any], factor: float) -> float:
    """What cos and sin are multiplied by, as transformers infers it from a config."""
    numerator, denominator = real(fields, "mscale", 0.0), real(fields, "mscale_all_dim", 0.0)
    inferred = yarn_mscale(factor, 1.0)
    if numerator and denominator:
        inferred = yarn_mscale(factor, numerator) / yarn_mscale(factor, denominator)
    return real(fields, "attention_factor", inferred)
