"""The shipped DeepSeek-V3 miniature is what was promised: accuracy and loads as reported, architecture, weights."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open

from ridgewalk.zoo import zoo_path

DEMO = zoo_path("demo-moe")


def test_the_report_that_ships_keeps_the_promises() -> None:
    report = json.loads((DEMO / "EVAL.json").read_text())
    assert report["n"] >= 1000
    assert report["accuracy"] >= 0.95
    assert len(report["expert_load"]) == 3
    assert max(report["expert_load"]) < 2
    assert report["training_cpu_seconds"] < 2 * 3600  # an hour of two cores; other programs ran beside it


def test_it_reads_what_demo_dense_reads() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DEMO / name).read_bytes() == (zoo_path("demo-dense") / name).read_bytes()


def test_the_architecture_is_deepseek_v3_in_miniature_and_divides_by_four() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["num_attention_heads"] % 4 == 0
    assert config["q_lora_rank"] is not None
    assert config["n_routed_experts"] >= 8
    assert config["n_shared_experts"] >= 1
    assert 1 <= config["topk_group"] < config["n_group"]
    assert 1 <= config["first_k_dense_replace"] < config["num_hidden_layers"]
    assert config["num_nextn_predict_layers"] == 0


def test_the_weights_are_bf16_but_for_the_routers_biases() -> None:
    with safe_open(DEMO / "model.safetensors", "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - not a dict
    biases = {name: tensors.pop(name) for name in list(tensors) if name.endswith("e_score_correction_bias")}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert {t.dtype for t in biases.values()} == {torch.float32}
    assert len(biases) == 3
    assert all(bias.any() for bias in biases.values())
    assert 3e6 <= sum(t.numel() for t in tensors.values()) <= 6e6
