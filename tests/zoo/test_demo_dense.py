"""The shipped dense model is what was promised: outputs as long and as uneven, the size, the architecture."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open

from ridgewalk.zoo import zoo_path
from ridgewalk.zoo.evaluate import judge
from ridgewalk.zoo.problems import easy_problems

DEMO = zoo_path("demo-dense")


def test_with_thinking_off_it_answers_at_once() -> None:
    """A number and nothing else. It is often wrong (EVAL.json says how often): this model needs its reasoning."""
    judged = judge(DEMO, easy_problems(40, seed=11), max_new_tokens=16, thinking=False)
    assert sum(j.text.strip().lstrip("-").isdigit() for j in judged) >= 36


def test_the_report_that_ships_keeps_the_promises() -> None:
    report = json.loads((DEMO / "EVAL.json").read_text())
    assert report["accuracy"] >= 0.95
    assert report["output_tokens"]["mean"] >= 100
    assert report["output_tokens"]["p99"] >= 3 * report["output_tokens"]["median"]
    assert report["training_seconds"] < 3600


def test_the_weights_are_bf16_qwen3_and_divide_by_four() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["num_attention_heads"] % 4 == config["num_key_value_heads"] % 4 == 0
    with safe_open(DEMO / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118 - not a dict
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert 2e6 <= sum(t.numel() for t in tensors) <= 5e6
