"""Tiny random checkpoints of every family, and transformers as the reference."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

COMMON = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


def _qwen2(**changes):
    return Qwen2Config(**{key: value for key, value in {**COMMON, **changes}.items() if key != "head_dim"}, head_dim=16)


FAMILIES = {
    "llama": lambda: LlamaConfig(**COMMON),
    "llama-bias": lambda: LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-llama3": lambda: LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE),
    "llama-linear": lambda: LlamaConfig(**COMMON, rope_parameters=LINEAR_ROPE),
    "llama-yarn": lambda: LlamaConfig(**COMMON, rope_parameters=YARN_ROPE),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: _qwen2(tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**COMMON, tie_word_embeddings=True),
    "qwen3-yarn": lambda: Qwen3Config(**COMMON, rope_parameters=YARN_ROPE),
}


def make_checkpoint(family: str, folder: Path, shards: bool = False) -> torch.nn.Module:
    """Save a random FP32 checkpoint whose logits have a spread of about 1 or more; the reference model."""
    torch.manual_seed(len(family) * 7919 + sum(map(ord, family)))
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 * 1.5)
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    return model.eval()


def edit_config(folder: Path, **changes: object) -> None:
    """Overwrite fields of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
