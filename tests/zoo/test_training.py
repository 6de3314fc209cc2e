"""The training script: all follows from the seed, and an interrupted run continues as if it had not been."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ridgewalk.zoo import train as train_module
from ridgewalk.zoo.data import block_batches
from ridgewalk.zoo.train import RECIPES, Trainer, learning_rate_at, train

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


def test_an_interrupted_run_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    straight = Trainer(TINY, tmp_path / "straight")
    straight.run()
    first = Trainer(TINY, tmp_path / "resumed")
    first.train_step()
    first.train_step()
    first.save_state()
    second = Trainer(TINY, tmp_path / "resumed")
    assert second.step == 2
    second.run()
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.model.state_dict().items())


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


def test_a_finished_run_leaves_a_checkpoint_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_module.RECIPES, "tiny", dataclasses.replace(TINY, steps=1))
    monkeypatch.setattr(train_module, "evaluate", lambda model, tokenizer, n, seed: {"seed": seed, "n": n})
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
