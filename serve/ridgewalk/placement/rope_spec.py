"""How a model rotates its queries and keys: the parameters of rotary position embeddings, read from a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
            ValueError: the kind is not one of `ROPE_TYPES`, only part of each head is rotated, or a field is missing.
        """
        fields: dict[str, Any] = dict(config.get("rope_scaling") or {})
        fields.update(config.get("rope_parameters") or {})
        rope_type = str(fields.get("rope_type") or fields.get("type") or "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
        rotary_share = float(fields.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
        if rotary_share != 1.0:
            raise ValueError(f"partial_rotary_factor {rotary_share} is not supported (only 1.0 is)")
        theta = float(fields.get("rope_theta") or config.get("rope_theta") or default_theta)
        original = int(fields.get("original_max_position_embeddings") or max_position_embeddings)
        if rope_type == "default":
            return cls(theta=theta)
        factor = fields.get("factor")
        if factor is None:
            if rope_type != "yarn":
                raise ValueError(f"rope type {rope_type!r} needs the field 'factor'")
            factor = max_position_embeddings / original
        if rope_type == "linear":
            return cls(rope_type, theta, float(factor))
        if rope_type == "llama3":
            missing = [name for name in ("low_freq_factor", "high_freq_factor") if name not in fields]
            if missing:
                raise ValueError(f"rope type 'llama3' needs the field {missing[0]!r}")
            low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
            return cls(rope_type, theta, float(factor), low, high, original)
        return cls(
            rope_type,
            theta,
            float(factor),
            original_max_position_embeddings=original,
            beta_fast=float(fields.get("beta_fast") or 32.0),
            beta_slow=float(fields.get("beta_slow") or 1.0),
            truncate=bool(fields.get("truncate", True)),
            attention_factor=_yarn_attention_factor(fields, float(factor)),
        )


def yarn_mscale(factor: float, weight: float) -> float:
    """Temperature of YaRN (arXiv 2309.00071, section 3.4) for a context grown by ``factor``, as DeepSeek weighs it."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention_factor(fields: Mapping[str, Any], factor: float) -> float:
    """What cos and sin are multiplied by, as transformers infers it from a config."""
    given = fields.get("attention_factor")
    if given is not None:
        return float(given)
    numerator, denominator = fields.get("mscale"), fields.get("mscale_all_dim")
    if numerator and denominator:
        return yarn_mscale(factor, float(numerator)) / yarn_mscale(factor, float(denominator))
    return yarn_mscale(factor, 1.0)
