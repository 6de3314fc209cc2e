"""The training script: all follows from the seed, and an interrupted run continues as if it had not been."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ridgewalk.zoo import train as train_module
from ridgewalk.zoo import zoo_path
from ridgewalk.zoo.data import block_batches
from ridgewalk.zoo.evaluate import Judged, expert_load
from ridgewalk.zoo.experts import LoadMeter, balance, routers_of, worst_over_mean
from ridgewalk.zoo.problems import sample_problems
from ridgewalk.zoo.train import RECIPES, Recipe, Trainer, build_model, learning_rate_at, save_model, train

PARTS = ("gate", "up", "down")

TINY = dataclasses.replace(
    RECIPES["demo-dense"],
    config={
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    steps=4,
    warmup=2,
    batch_tokens=2048,
)
TINY_MOE = dataclasses.replace(
    RECIPES["demo-moe"],
    config=RECIPES["demo-moe"].config
    | {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 16,
    },
    steps=4,
    warmup=2,
    batch_tokens=2048,
)


@pytest.mark.parametrize("recipe", [TINY, TINY_MOE], ids=["dense", "moe"])
def test_an_interrupted_run_continues_as_if_it_had_not_been(recipe: Recipe, tmp_path: Path) -> None:
    straight = Trainer(recipe, tmp_path / "straight")
    straight.run()
    first = Trainer(recipe, tmp_path / "resumed")
    first.train_step()
    first.train_step()
    first.save_state()
    second = Trainer(recipe, tmp_path / "resumed")
    assert second.step == 2
    second.run()
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.model.state_dict().items())


def test_every_parameter_is_trained_by_one_optimizer(tmp_path: Path) -> None:
    trainer = Trainer(TINY_MOE, tmp_path)
    trained = [id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in trainer.model.parameters())
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step()
    assert not [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]


def test_each_step_moves_the_bias_of_every_router_by_its_speed(tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(TINY_MOE, bias_speed=0.01, warmup=0), tmp_path)
    trainer.train_step()
    biases = torch.stack([router.e_score_correction_bias for router in trainer.load_meter.routers])
    assert biases.shape == (2, 8)
    assert biases[biases != 0].abs().tolist() == pytest.approx([0.01] * int((biases != 0).sum()))
    assert (biases > 0).any(dim=1).all()
    assert (biases < 0).any(dim=1).all()


def test_the_bias_evens_the_load_out() -> None:
    torch.manual_seed(0)
    model = build_model(TINY_MOE, Tokenizer.from_file(str(zoo_path("demo-dense") / "tokenizer.json")))
    meter, ids = LoadMeter(model), torch.randint(0, 640, (8, 64))
    loads = []
    for _ in range(30):
        with torch.inference_mode():
            model(ids, use_cache=False)
        loads.append(meter.loads(ids >= 0))
        assert loads[-1].sum(dim=1).tolist() == [2 * ids.numel()] * 2
        balance(meter.routers, loads[-1], 0.02)
    assert max(worst_over_mean(loads[-1])) < 1.3 < min(worst_over_mean(loads[0]))


def test_tokens_of_the_padding_count_for_no_expert() -> None:
    torch.manual_seed(0)
    model = build_model(TINY_MOE, Tokenizer.from_file(str(zoo_path("demo-dense") / "tokenizer.json")))
    meter = LoadMeter(model)
    real = torch.arange(10)[None] < torch.tensor([[10], [4]])
    model(torch.full((2, 10), 5), use_cache=False)
    assert meter.loads(real).sum(dim=1).tolist() == [2 * 14] * 2


def test_batches_follow_from_seed_and_block(tmp_path: Path) -> None:
    tokenizer = Trainer(TINY, tmp_path).tokenizer
    batches = block_batches(tokenizer, 0, 5, 8, 2048, pad_id=0)
    assert batches == block_batches(tokenizer, 0, 5, 8, 2048, pad_id=0)
    assert batches != block_batches(tokenizer, 0, 6, 8, 2048, pad_id=0)
    for batch in batches:
        assert len(batch.ids) * len(batch.ids[0]) <= 2048
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            learnt = [i for i, label in enumerate(labels) if label != -100]
            assert learnt == list(range(learnt[0], learnt[-1] + 1))
            assert [labels[i] for i in learnt[:-1]] == ids[learnt[0] + 1 : learnt[-1] + 1]
            assert tokenizer.id_to_token(labels[learnt[-1]]) == "<|im_end|>"


def test_the_learning_rate_warms_up_and_falls() -> None:
    recipe = RECIPES["demo-dense"]
    rates = [learning_rate_at(recipe, step) for step in range(recipe.steps)]
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert rates[0] < rates[recipe.warmup // 2] < rates[recipe.warmup]
    assert rates[-1] < 0.02 * recipe.learning_rate


@pytest.mark.parametrize("recipe", [TINY, TINY_MOE], ids=["dense", "moe"])
def test_a_finished_run_leaves_a_checkpoint_folder(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train_module.RECIPES, "tiny", dataclasses.replace(recipe, steps=1))
    monkeypatch.setattr(train_module, "evaluate", lambda folder, n, seed: {"seed": seed, "n": n})
    report = train("tiny", tmp_path, problems=4)
    assert report["n"] == 4
    assert {p.name for p in tmp_path.iterdir()} == {
        "EVAL.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = {name: p.dtype for name, p in model.named_parameters() if not name.endswith("mlp.gate.weight")}
    assert set(weights.values()) == {torch.bfloat16}  # routers are computed in FP32, which transformers may also keep


def test_a_sparse_model_is_written_as_deepseek_writes_its_own(tmp_path: Path) -> None:
    """One matrix per projection and expert, BF16 but for the routers' biases, and no MTP module announced."""
    trainer = Trainer(TINY_MOE, tmp_path)
    for router in trainer.load_meter.routers:
        router.e_score_correction_bias.fill_(0.123456)
    save_model(trainer, tmp_path)
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["num_nextn_predict_layers"] == 0
    weights = load_file(tmp_path / "model.safetensors")
    experts = {f"model.layers.{i}.mlp.experts.{e}.{p}_proj.weight" for i in (1, 2) for e in range(8) for p in PARTS}
    assert {name for name in weights if ".experts." in name} == experts
    assert weights["model.layers.1.mlp.experts.7.gate_proj.weight"].shape == (16, 32)
    biases = {name for name, tensor in weights.items() if tensor.dtype != torch.bfloat16}
    assert biases == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}
    assert "lm_head.weight" not in weights
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(read_back(ids).logits, trainer.model.eval()(ids).logits)
    assert routers_of(read_back)[0].e_score_correction_bias.dtype == torch.float32


def test_the_report_says_how_even_the_experts_load_is(tmp_path: Path) -> None:
    trainer = Trainer(TINY_MOE, tmp_path)
    judged = [Judged(problem, problem.output, 1, True) for problem in sample_problems(10)]
    even = expert_load(trainer.model, trainer.tokenizer, judged, batch_size=3)
    assert even == expert_load(trainer.model, trainer.tokenizer, judged, batch_size=10)
    assert len(even) == 2
    assert all(1 <= load <= 4 for load in even)
    for router in trainer.load_meter.routers:  # now every token chooses the same two of the eight
        router.e_score_correction_bias.copy_(torch.tensor([0, 0, 9, 9, 0, 0, 0, 0]))
    assert expert_load(trainer.model, trainer.tokenizer, judged) == [4, 4]
    dense = Trainer(TINY, tmp_path)
    assert expert_load(dense.model, dense.tokenizer, judged) == []
