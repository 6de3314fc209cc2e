"""What ModelSpec reads is what transformers builds: from hub configs, and from what transformers itself writes."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from ridgewalk.placement.model_spec import ModelSpec
from tests.placement.hub_configs import DEEPSEEK_R1, DEEPSEEK_V2, DEEPSEEK_V2_LITE, MIXTRAL_8X7B, QWEN3_30B_A3B

HUB = [
    (MixtralConfig, MIXTRAL_8X7B),
    (Qwen3MoeConfig, QWEN3_30B_A3B),
    (DeepseekV2Config, DEEPSEEK_V2_LITE),
    (DeepseekV2Config, DEEPSEEK_V2),
    (DeepseekV3Config, DEEPSEEK_R1),
]
IDS = ["mixtral", "qwen3_moe", "v2_lite", "v2", "r1"]
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}


def build(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count(model: torch.nn.Module) -> int:
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return sum(tensor.numel() for tensor in [*model.parameters(), *biases])


def sparse_layers(model: torch.nn.Module) -> tuple[int, ...]:
    return tuple(index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))


def written(config: PreTrainedConfig, architecture: str) -> dict:
    """As `save_pretrained` writes it into a model's folder."""
    return {**config.to_diff_dict(), "architectures": [architecture]}


@pytest.mark.parametrize(("config_class", "hub"), HUB, ids=IDS)
def test_hub_config(config_class, hub):
    model = build(config_class(**{key: hub[key] for key in hub if key not in ("auto_map", "quantization_config")}))
    spec = ModelSpec.from_config(hub)
    assert spec.num_parameters == count(model)
    assert spec.moe.sparse_layers == sparse_layers(model)
    if spec.mla:
        attention = model.model.layers[0].self_attn
        assert spec.mla.softmax_scale == pytest.approx(attention.scaling)
        assert spec.mla.norm_eps == attention.kv_a_layernorm.variance_epsilon


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (MixtralConfig(**SMALL), "MixtralForCausalLM"),
        (Qwen3MoeConfig(**SMALL, head_dim=8, decoder_sparse_step=2, num_experts=16), "Qwen3MoeForCausalLM"),
        (DeepseekV2Config(**SMALL, **LATENT, q_lora_rank=None, num_experts_per_tok=3), "DeepseekV2ForCausalLM"),
        (DeepseekV3Config(**SMALL, **LATENT, first_k_dense_replace=2, n_routed_experts=16), "DeepseekV3ForCausalLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_that_transformers_writes(config, architecture):
    model, spec = build(config), ModelSpec.from_config(written(config, architecture))
    assert spec.num_parameters == count(model)
    assert spec.moe.sparse_layers == sparse_layers(model)
    assert spec.moe.num_experts == model.model.layers[-1].mlp.gate.num_experts
    assert spec.moe.top_k == config.num_experts_per_tok
    assert spec.rms_norm_eps == model.model.norm.variance_epsilon


@pytest.mark.parametrize(
    ("architecture", "config_class"),
    [
        ("MixtralForCausalLM", MixtralConfig),
        ("Qwen3MoeForCausalLM", Qwen3MoeConfig),
        ("DeepseekV2ForCausalLM", DeepseekV2Config),
        ("DeepseekV3ForCausalLM", DeepseekV3Config),
    ],
)
def test_fields_that_are_missing_take_transformers_defaults(architecture, config_class):
    needed = {**SMALL, "max_position_embeddings": 4096, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    config = {**needed, **LATENT} if architecture.startswith("Deepseek") else needed
    filled = written(config_class(**config), architecture)
    assert ModelSpec.from_config({**config, "architectures": [architecture]}) == ModelSpec.from_config(
        {key: value for key, value in filled.items() if key not in ("eos_token_id", "bos_token_id", "dtype")}
    )
