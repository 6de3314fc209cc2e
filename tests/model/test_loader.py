"""Reading slices of checkpoints: one file or many, what is converted, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from ridgewalk.model.checkpoint import INDEX_NAME, CheckpointError
from ridgewalk.model.loader import load_parameters
from ridgewalk.model.sharding import shard_plan
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from tests.model.checkpoints import edit_config, edit_tensors, make_checkpoint

CPU = torch.device("cpu")
ONE_RANK = Mesh()


def load(folder, mesh=ONE_RANK, rank=0, progress=None, dtype=torch.float32):
    spec = ModelSpec.from_folder(folder)
    return load_parameters(folder, spec, shard_plan(spec, mesh, rank), dtype, CPU, progress)


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "deepseek-v3-fp8"])
def test_sharded_files_read_like_a_single_one(tmp_path, checkpoint, family):
    make_checkpoint(family, tmp_path, shards=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    single, many = load(checkpoint(family).folder, Mesh(tp=2), 1), load(tmp_path, Mesh(tp=2), 1)
    assert single.keys() == many.keys()
    assert all(torch.equal(single[name], many[name]) for name in single)


def test_files_that_a_rank_needs_nothing_from_are_not_opened(tmp_path, checkpoint):
    whole = load(checkpoint("deepseek-v3").folder, Mesh(pp=4), 3)
    make_checkpoint("deepseek-v3", tmp_path, shards=True)
    weight_map = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    needed = {
        file for name, file in weight_map.items() if name.startswith(("model.layers.3.", "model.norm", "lm_head"))
    }
    damaged = set(weight_map.values()) - needed
    assert damaged
    for name in damaged:
        (tmp_path / name).write_bytes(b"not safetensors")
    part = load(tmp_path, Mesh(pp=4), 3)
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_routers_of_deepseek_stay_in_fp32(checkpoint):
    deepseek = load(checkpoint("deepseek-v3").folder, dtype=torch.bfloat16)
    wide = {name.split(".")[2] for name, values in deepseek.items() if values.dtype != torch.bfloat16}
    assert wide == {"router", "router_bias"}
    mixtral = load(checkpoint("mixtral").folder, dtype=torch.bfloat16)
    assert {values.dtype for values in mixtral.values()} == {torch.bfloat16}


def test_progress_reaches_the_bytes_of_the_rank(checkpoint):
    calls = []
    loaded = load(checkpoint("mixtral").folder, progress=lambda done, total: calls.append((done, total)))
    size = sum(tensor.nbytes for tensor in loaded.values())
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)


def test_missing_tensor_is_named(checkpoint, tmp_path):
    folder = edit_tensors(checkpoint("llama").folder, tmp_path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor .*\.1\.mlp\.up_proj\.weight; expected shape \[96, 64\]"):
        load(folder)


def test_tensor_of_another_shape_is_named(checkpoint, tmp_path):
    folder = edit_tensors(
        checkpoint("llama").folder, tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(7)})
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* has shape \[7\], expected \[64\]"):
        load(folder)


def test_tensor_that_the_config_does_not_call_for_is_named(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = edit_tensors(checkpoint("llama").folder, tmp_path, lambda t: t.update({name: torch.ones(128)}))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias that its config\.json does not call for"):
        load(folder)


def test_tied_checkpoint_may_repeat_its_head(checkpoint, tmp_path):
    folder = edit_tensors(
        checkpoint("qwen3").folder, tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(131, 64)})
    )
    assert "head" not in load(folder)


def test_layers_that_predict_further_tokens_are_passed_over(checkpoint, tmp_path):
    def add(tensors):
        for name in ("eh_proj.weight", "enorm.weight", "mlp.experts.0.up_proj.weight", "shared_head.head.weight"):
            tensors[f"model.layers.4.{name}"] = torch.ones(3, 3)

    folder = edit_tensors(checkpoint("deepseek-v3").folder, tmp_path, add)
    assert not any(name.startswith("layers.4.") for name in load(folder))


def test_more_layers_than_the_config_names_are_an_error(checkpoint, tmp_path):
    folder = edit_tensors(checkpoint("deepseek-v3").folder, tmp_path, lambda t: None)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.\S+ that its config\.json does not call for"):
        load(folder)


def test_rotary_frequencies_are_passed_over(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(edit_tensors(checkpoint("llama").folder, tmp_path, lambda t: t.update({name: torch.ones(8)})))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers.2.block_sparse_moe.experts.5.w3.weight"),
        ("qwen3-moe", "model.layers.3.mlp.experts.7.down_proj.weight"),
        ("deepseek-v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("deepseek-v2", "model.layers.1.mlp.shared_experts.up_proj.weight"),
    ],
)
def test_missing_tensor_of_another_rank_is_named(checkpoint, tmp_path, family, name):
    folder = edit_tensors(checkpoint(family).folder, tmp_path, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=rf"no tensor {name}; expected shape"):
        load(folder, Mesh(dp=2, pp=2, expert_parallel=True))


def test_expert_of_another_shape_is_named(checkpoint, tmp_path):
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    folder = edit_tensors(checkpoint("qwen3-moe").folder, tmp_path, lambda t: t.update({name: torch.ones(31, 64)}))
    with pytest.raises(CheckpointError, match=rf"{name} .* has shape \[31, 64\], expected \[32, 64\]"):
        load(folder, Mesh(dp=2, expert_parallel=True), 1)


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
    folder = edit_tensors(checkpoint("llama").folder, tmp_path, lambda t: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder)
