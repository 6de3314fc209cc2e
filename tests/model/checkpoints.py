"""Tiny random checkpoints of every family, and transformers as the reference."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

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
DEEPSEEK_V2_ROPE = {**YARN_ROPE, "mscale": 0.9, "mscale_all_dim": 0.6}
DEEPSEEK_V3_ROPE = {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
FOUR_LAYERS = {**COMMON, "num_hidden_layers": 4}
"""So that four pipeline stages have a layer each."""
MLA = {
    **{key: value for key, value in FOUR_LAYERS.items() if key != "head_dim"},
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
EAGER = {"dtype": torch.float32, "attn_implementation": "eager"}
EAGER_EXPERTS = {**EAGER, "experts_implementation": "eager"}
"""transformers' plainest code, one expert after the other, which its faster implementations are measured against."""
FP8_BLOCK = (16, 8)
"""Rows and columns of a block of the FP8 checkpoint; several sizes are no multiples of it."""


def _qwen2(**changes):
    return Qwen2Config(**{key: value for key, value in {**COMMON, **changes}.items() if key != "head_dim"}, head_dim=16)


def _qwen3_moe(**changes):
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeConfig(**FOUR_LAYERS, **experts, mlp_only_layers=[1], **changes)


def _deepseek_v2(**changes):
    return DeepseekV2Config(**{**MLA, "n_shared_experts": 2, "routed_scaling_factor": 1.5, **changes})


def _deepseek_v3(**changes):
    return DeepseekV3Config(**{**MLA, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, **changes})


DENSE = {
    "llama": lambda: LlamaConfig(**COMMON),
    "llama-bias": lambda: LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-llama3": lambda: LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE),
    "llama-linear": lambda: LlamaConfig(**COMMON, rope_parameters=LINEAR_ROPE),
    "llama-yarn": lambda: LlamaConfig(**COMMON, rope_parameters=YARN_ROPE),
    "llama-4-layers": lambda: LlamaConfig(**FOUR_LAYERS),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: _qwen2(tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**COMMON, tie_word_embeddings=True),
    "qwen3-yarn": lambda: Qwen3Config(**COMMON, rope_parameters=YARN_ROPE),
    "qwen3-4-layers": lambda: Qwen3Config(**FOUR_LAYERS, tie_word_embeddings=True),
}
SPARSE = {
    "mixtral": lambda: MixtralConfig(**FOUR_LAYERS, num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "qwen3-moe": lambda: _qwen3_moe(norm_topk_prob=True),
    "qwen3-moe-raw-weights": lambda: _qwen3_moe(norm_topk_prob=False, tie_word_embeddings=True),
    "deepseek-v2": lambda: _deepseek_v2(q_lora_rank=None, topk_method="greedy"),
    "deepseek-v2-groups": lambda: _deepseek_v2(
        topk_method="group_limited_greedy", n_group=4, topk_group=2, rope_parameters=DEEPSEEK_V2_ROPE
    ),
    "deepseek-v3": lambda: _deepseek_v3(rope_parameters=DEEPSEEK_V3_ROPE),
    "deepseek-v3-fp8": lambda: _deepseek_v3(rope_parameters=DEEPSEEK_V3_ROPE),
    "deepseek-v3-aligned-fp8": lambda: _deepseek_v3(moe_intermediate_size=32, v_head_dim=16),
    "deepseek-v3-no-q-lora": lambda: _deepseek_v3(q_lora_rank=None, n_group=4, topk_group=2),
}
FAMILIES = {**DENSE, **SPARSE}
"""Configs by name. Those of `SPARSE` have 4 layers, 8 heads and 8 routed experts."""


def make_checkpoint(family: str, folder: Path, shards: bool = False) -> torch.nn.Module:
    """Save a random FP32 checkpoint whose logits have a spread of about 1 or more; the reference model.

    A family whose name ends in ``-fp8`` is saved in FP8 with block scales; its reference has the very weights that
    these stand for.
    """
    torch.manual_seed(len(family) * 7919 + sum(map(ord, family)))
    config = FAMILIES[family]()
    model = AutoModelForCausalLM.from_config(config, **(EAGER_EXPERTS if family in SPARSE else EAGER))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 * 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    size = "60KB" if shards else "1GB"
    if not family.endswith("-fp8"):
        model.save_pretrained(folder, max_shard_size=size)
        return model.eval()
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)
        return write_fp8_copy(Path(plain), folder, size).eval()


def write_fp8_copy(source: Path, target: Path, max_shard_size: str = "1GB") -> torch.nn.Module:
    """Write a checkpoint's attention and MLP matrices in FP8 blocks; the model of the weights that these stand for."""
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    rounded = dict(tensors)
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight") or "_proj_with_mqa" in name:
            tensors[name], tensors[f"{name}_scale_inv"], rounded[name] = quantize(weight)
    save_torch_state_dict(rounded, source)
    save_torch_state_dict(tensors, target, max_shard_size=max_shard_size)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["quantization_config"] = {**quantization, "weight_block_size": list(FP8_BLOCK)}
    (target / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(source, **EAGER_EXPERTS)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 values, the FP32 scale of each block, and their product in FP32."""
    rows, columns = (torch.arange(size) // block for size, block in zip(weight.shape, FP8_BLOCK, strict=True))
    scales = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
    for row, column in ((row, column) for row in range(len(scales)) for column in range(scales.shape[1])):
        scales[row, column] = weight[rows == row][:, columns == column].abs().max() / 448  # the largest of e4m3
    spread = scales[rows][:, columns]
    values = (weight / spread).to(torch.float8_e4m3fn)
    return values, scales, values.to(torch.float32) * spread


def edit_config(folder: Path, **changes: object) -> None:
    """Overwrite fields of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Copy a checkpoint in one file into ``target``, changed on the way; ``target``."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target
