"""Sharding as data, and reading slices of checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ridgewalk.model.loader import CheckpointError, load_parameters
from ridgewalk.model.sharding import shard_plan
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from tests.model.checkpoints import FAMILIES, make_checkpoint

CPU = torch.device("cpu")


def load(folder, tp=1, rank=0, progress=None):
    return load_parameters(folder, shard_plan(ModelSpec.from_folder(folder), tp, rank), torch.float32, CPU, progress)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_plan_holds_as_many_parameters_as_the_spec_says(checkpoint, family, tp):
    spec = ModelSpec.from_folder(checkpoint(family).folder)
    for rank in range(tp):
        plan = shard_plan(spec, tp, rank)
        count = sum(torch.Size(parameter.shape).numel() for parameter in plan.values())
        assert count == spec.num_parameters_per_rank(Mesh(tp=tp))


def test_shards_cover_the_checkpoint(checkpoint):
    tensors = load_file(checkpoint("qwen3-yarn").folder / "model.safetensors")
    ranks = [load(checkpoint("qwen3-yarn").folder, 4, rank) for rank in range(4)]
    embedding = torch.cat([rank["embedding"] for rank in ranks])
    assert torch.equal(embedding[:131], tensors["model.embed_tokens.weight"])
    assert torch.equal(embedding[131:], torch.zeros(1, 64))  # 131 tokens over 4 ranks
    down = torch.cat([rank["layers.1.down"] for rank in ranks], dim=1)
    assert torch.equal(down, tensors["model.layers.1.mlp.down_proj.weight"])
    # 2 KV heads over 4 ranks: each is held twice, beside the queries that use it.
    qkv = [rank["layers.0.qkv"] for rank in ranks]
    key = tensors["model.layers.0.self_attn.k_proj.weight"]
    assert all(torch.equal(qkv[rank][32:48], key[16 * (rank // 2) : 16 * (rank // 2 + 1)]) for rank in range(4))


def test_sharded_files_read_like_a_single_one(tmp_path, checkpoint):
    make_checkpoint("qwen3", tmp_path, shards=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    single, many = load(checkpoint("qwen3").folder, 2, 1), load(tmp_path, 2, 1)
    assert all(torch.equal(single[name], many[name]) for name in single)


def test_progress_reaches_the_end(checkpoint):
    calls = []
    load(checkpoint("llama").folder, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)


def copy_of(folder, target, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_missing_tensor_is_named(checkpoint, tmp_path):
    folder = copy_of(checkpoint("llama").folder, tmp_path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor .*\.1\.mlp\.up_proj\.weight; expected shape \[96, 64\]"):
        load(folder)


def test_tensor_of_another_shape_is_named(checkpoint, tmp_path):
    folder = copy_of(checkpoint("llama").folder, tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* has shape \[7\], expected \[64\]"):
        load(folder)


def test_tensor_that_the_config_does_not_call_for_is_named(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = copy_of(checkpoint("llama").folder, tmp_path, lambda t: t.update({name: torch.ones(128)}))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias that its config\.json does not call for"):
        load(folder)


def test_tied_checkpoint_may_repeat_its_head(checkpoint, tmp_path):
    folder = copy_of(checkpoint("qwen3").folder, tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(131, 64)}))
    assert "head" not in load(folder)


def test_no_checkpoint_is_an_error(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint("llama").folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(tmp_path)


def test_index_that_names_a_missing_file_is_an_error(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint("llama").folder / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks gone\.safetensors"):
        load(tmp_path)


def test_truncated_file_is_an_error(checkpoint, tmp_path):
    folder = copy_of(checkpoint("llama").folder, tmp_path, lambda t: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder)
