"""Random checkpoints: transformers loads them, every id decodes, and they follow from the seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ridgewalk.zoo import zoo_path
from ridgewalk.zoo.random_checkpoint import SHAPES, make_random_checkpoint, tensor_shapes, write_checkpoint

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
}
SMALL_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {**SHAPES["q50m"], **SMALL},
    "qwen3_moe": {**SHAPES["moe"], **SMALL, "num_experts": 8, "moe_intermediate_size": 32},
}
PARAMETERS = {"q06b": 596_049_920, "q50m": 45_900_000, "moe": 176_700_000}


@pytest.mark.parametrize("kind", list(SMALL_SHAPES))
def test_transformers_loads_every_tensor(kind: str, tmp_path: Path) -> None:
    write_checkpoint(SMALL_SHAPES[kind], tmp_path, seed=0, dtype="bfloat16")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert model.config.model_type == kind
    assert model.dtype == torch.bfloat16
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        logits = model(torch.arange(32)[None]).logits
    assert logits.shape == (1, 32, 1000)
    assert logits.isfinite().all()


@pytest.mark.parametrize("like", list(SHAPES))
def test_shapes_are_those_that_transformers_builds(like: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[like]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    ours = sum(torch.Size(shape).numel() for _, shape in tensor_shapes(SHAPES[like]))
    assert ours == sum(p.numel() for p in model.parameters())
    assert ours == pytest.approx(PARAMETERS[like], rel=0.01)


def test_weights_follow_from_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(SMALL_SHAPES["qwen3"], tmp_path / name, seed, "float32")
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    weight = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(a[weight], c[weight])
    assert a[weight].std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(a["model.norm.weight"], torch.ones(64))


def test_every_id_decodes_and_text_comes_back(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    make_random_checkpoint("q50m", tmp_path, on_progress=lambda done, total: progress.append((done, total)))
    assert progress[-1][0] == progress[-1][1]
    config = json.loads((tmp_path / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 16000
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(16000)]
    assert all(texts)
    demo = Tokenizer.from_file(str(zoo_path("demo-dense") / "tokenizer.json"))
    question = "<|im_start|>user\n12 + 7?<|im_end|>\n<think>"
    assert tokenizer.encode(question).ids == demo.encode(question).ids
    assert tokenizer.decode(tokenizer.encode("Größe 12 🚶").ids) == "Größe 12 🚶"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode([15999]) == texts[15999]
    assert loaded.eos_token_id == config["eos_token_id"]
    prompt = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="q06b"):
        make_random_checkpoint("q7b", tmp_path)
    with pytest.raises(ValueError, match="float32"):
        make_random_checkpoint("q50m", tmp_path, dtype="int4")


def test_a_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="remove it or name another"):
        make_random_checkpoint("q50m", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
