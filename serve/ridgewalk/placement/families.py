"""Architectures that are built: what their configs leave unsaid, and which of their features are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ridgewalk.placement.moe_spec import MoESpec, read_deepseek_v2, read_deepseek_v3, read_mixtral, read_qwen3_moe


@dataclass(frozen=True)
class Family:
    """What the config of an architecture leaves unsaid."""

    name: str
    qkv_bias: bool = False  # q, k and v have a bias whatever the config says
    qk_norm: bool = False  # RMS norm over each head of q and k
    attention_bias_field: bool = False  # `attention_bias` is read
    mlp_bias_field: bool = False  # `mlp_bias` is read
    window_field: bool = False  # `sliding_window` is read
    window_switch: bool = False  # `sliding_window` counts only with `use_sliding_window`
    rms_norm_eps: float = 1e-6  # where the config has none
    rope_theta: float = 10000.0  # where the config has none
    read_moe: Callable[[Mapping[str, Any]], MoESpec | None] | None = None  # None: all layers are dense
    latent_attention: bool = False
    rope_interleave: bool = True  # latent attention only: where the config has none


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", attention_bias_field=True, mlp_bias_field=True),
    "MistralForCausalLM": Family("mistral", window_field=True),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, window_switch=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, attention_bias_field=True, window_switch=True),
    "MixtralForCausalLM": Family(
        "mixtral", window_field=True, rms_norm_eps=1e-5, rope_theta=1e6, read_moe=read_mixtral
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", qk_norm=True, attention_bias_field=True, window_switch=True, read_moe=read_qwen3_moe
    ),
    "DeepseekV2ForCausalLM": Family("deepseek_v2", read_moe=read_deepseek_v2, latent_attention=True),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", read_moe=read_deepseek_v3, latent_attention=True),
}
"""Architectures that are built, by the name in `architectures` of a Hugging Face config."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """The key of `FAMILIES` that a config names.

    Raises:
        ValueError: it is not one of them.
    """
    names = config.get("architectures") or [config.get("model_type")]
    if names[0] is None:
        raise ValueError(f"config.json names no model: `architectures` is missing (supported: {', '.join(FAMILIES)})")
    if names[0] not in FAMILIES:
        raise ValueError(f"architecture {names[0]} is not supported (supported: {', '.join(FAMILIES)})")
    return str(names[0])


def refuse_unbuilt(config: Mapping[str, Any], family: Family) -> None:
    """Refuse features that any of the families may turn on and none has here.

    Raises:
        ValueError: a sentence that names the field.
    """
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported (only 'silu' is)")
    window = config.get("sliding_window") is not None
    if family.window_switch:
        active, field = bool(config.get("use_sliding_window", False)) and window, "use_sliding_window"
    else:
        active, field = family.window_field and window, "sliding_window"
    if active or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError(
            f"sliding-window attention is not supported, but {field} of this {family.name} config turns it on"
        )
