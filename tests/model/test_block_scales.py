"""FP8 weights with block scales: what is loaded is exactly what they stand for."""

from __future__ import annotations

import pytest
import torch

from ridgewalk.kernels.block_scales import Fp8Weight, block_linear, block_range, dequantize, scales_shape
from ridgewalk.model.checkpoint import CheckpointError
from ridgewalk.model.loader import load_parameters
from ridgewalk.model.sharding import shard_plan
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from tests.model.checkpoints import FP8_BLOCK, edit_config, edit_tensors, quantize
from tests.model.reassembly import stored_tensors

ONE_RANK = Mesh()
DOWN = "model.layers.1.mlp.experts.5.down_proj.weight"
UP = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("deepseek-v3-fp8").folder


def load(folder, mesh=ONE_RANK, rank=0, dtype=torch.float32, keeps_fp8=False, progress=None):
    spec = ModelSpec.from_folder(folder)
    plan = shard_plan(spec, mesh, rank, keeps_fp8=keeps_fp8)
    return load_parameters(folder, spec, plan, dtype, torch.device("cpu"), progress)


def kept(folder, mesh=ONE_RANK, rank=0, layer=1):
    """Names of the parameters of a layer that stay in FP8."""
    prefix, parameters = f"layers.{layer}.", load(folder, mesh, rank, keeps_fp8=True)
    found = {name for name, weight in parameters.items() if isinstance(weight, Fp8Weight)}
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def whole(weight):
    return dequantize(weight.values, weight.scales, (0, 0), weight.block)


@pytest.mark.parametrize("rows", [(0, 40), (0, 16), (16, 32), (5, 11), (5, 40), (15, 17), (39, 40)])
@pytest.mark.parametrize("columns", [(0, 21), (8, 16), (3, 9), (7, 21), (20, 21)])
def test_any_slice_equals_that_of_the_whole(rows, columns):
    weight = torch.randn(40, 21, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 22)
    values, scales, product = quantize(weight)
    assert scales.shape == scales_shape(weight.shape, FP8_BLOCK) == (3, 3)
    (first, last), (left, right) = block_range(*rows, FP8_BLOCK[0]), block_range(*columns, FP8_BLOCK[1])
    part = values[slice(*rows), slice(*columns)]
    found = dequantize(part, scales[first:last, left:right], (rows[0], columns[0]), FP8_BLOCK)
    assert torch.equal(found, product[slice(*rows), slice(*columns)])


def test_slices_of_a_rank_need_not_begin_at_a_block(folder):
    """24 rows of an expert over 2 ranks: the second one begins in the middle of the first block of 16 rows."""
    up, down = stored_tensors(folder)[UP], stored_tensors(folder)[DOWN]
    loaded = load(folder, Mesh(tp=2), 1)
    assert torch.equal(loaded["layers.1.experts_gate_up"][5, 12:], up[12:])
    assert torch.equal(loaded["layers.1.experts_down"][5], down[:, 12:])


def test_reference_has_the_loaded_weights(checkpoint, folder):
    weights = checkpoint("deepseek-v3-fp8").reference.state_dict()
    loaded = load(folder)
    assert torch.equal(loaded["layers.2.experts_down"], weights["model.layers.2.mlp.experts.down_proj"])
    assert torch.equal(loaded["layers.0.kv_b"], weights["model.layers.0.self_attn.kv_b_proj.weight"])


def test_weights_are_converted_to_the_compute_dtype(folder):
    exact, rounded = load(folder)["layers.0.o"], load(folder, dtype=torch.bfloat16)["layers.0.o"]
    assert torch.equal(exact.bfloat16(), rounded)


def test_weights_without_scales_are_read_as_they_are(folder, tmp_path):
    plain = stored_tensors(folder)[DOWN]

    def change(tensors):
        tensors[DOWN] = plain
        del tensors[f"{DOWN}_scale_inv"]

    assert torch.equal(load(edit_tensors(folder, tmp_path, change))["layers.1.experts_down"][5], plain)


def test_missing_scale_is_named(folder, tmp_path):
    edit_tensors(folder, tmp_path, lambda t: t.pop(f"{DOWN}_scale_inv"))
    with pytest.raises(CheckpointError, match=rf"no tensor {DOWN}_scale_inv; expected shape \[4, 3\]"):
        load(tmp_path)


def test_scale_of_another_shape_is_named(folder, tmp_path):
    edit_tensors(folder, tmp_path, lambda t: t.update({f"{DOWN}_scale_inv": torch.ones(3, 4)}))
    with pytest.raises(CheckpointError, match=rf"{DOWN}_scale_inv .* has shape \[3, 4\], expected \[4, 3\]"):
        load(tmp_path)


def test_fp8_weights_without_a_block_size_are_an_error(folder, tmp_path):
    def drop_scales(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            del tensors[name]

    edit_tensors(folder, tmp_path, drop_scales)
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"is stored as F8_E4M3, but config\.json names no weight_block_size"):
        load(tmp_path)


def test_scales_beside_a_weight_that_is_not_fp8_are_an_error(folder, tmp_path):
    edit_tensors(folder, tmp_path, lambda t: t.update({DOWN: t[DOWN].bfloat16()}))
    with pytest.raises(CheckpointError, match=rf"{DOWN} is stored as BF16, but has scales for FP8"):
        load(tmp_path)


def test_scales_of_nothing_are_an_error(folder, tmp_path):
    edit_tensors(folder, tmp_path, lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight_scale_inv that its config\.json does not call"):
        load(tmp_path)


PROJECTIONS = {"q_a", "q_b", "kv_a", "o"}
EXPERTS = {"experts_gate_up", "experts_down", "shared_gate_up", "shared_down"}


@pytest.fixture(scope="module")
def aligned(checkpoint):
    """Experts of 32 and values of 16 a head: two ranks cut them at the borders of blocks of 16 x 8."""
    return checkpoint("deepseek-v3-aligned-fp8").folder


def test_what_consists_of_whole_blocks_stays_in_fp8(aligned):
    assert kept(aligned) == kept(aligned, Mesh(tp=2), 1) == PROJECTIONS | EXPERTS
    assert kept(aligned, layer=0) == kept(aligned, Mesh(tp=2), 1, layer=0) == PROJECTIONS | {"gate_up", "down"}


def test_each_parameter_that_is_cut_within_a_block_is_dequantized(aligned):
    """tp=4: 48 rows of queries are whole blocks, 24 of the MLP and 8 of an expert are not; inputs come in eights."""
    for rank in range(4):
        assert kept(aligned, Mesh(tp=4), rank) == PROJECTIONS | {"experts_down", "shared_down"}
        assert kept(aligned, Mesh(tp=4), rank, layer=0) == PROJECTIONS | {"down"}


def test_stacked_matrices_that_end_within_a_block_are_dequantized(folder):
    """24 rows of gate are a block and a half, after which those of up begin; a matrix alone may end so."""
    assert kept(folder) == PROJECTIONS | {"experts_down", "shared_down"}
    assert kept(folder, Mesh(dp=2, expert_parallel=True)) == kept(folder)


@pytest.mark.parametrize("mesh", [ONE_RANK, Mesh(tp=2), Mesh(tp=4), Mesh(dp=2, expert_parallel=True)])
def test_what_is_kept_stands_for_the_same_weights(aligned, mesh):
    for rank in range(mesh.world_size):
        plain, narrow = load(aligned, mesh, rank), load(aligned, mesh, rank, keeps_fp8=True)
        for name, weight in narrow.items():
            if not isinstance(weight, Fp8Weight):
                assert torch.equal(weight, plain[name])
            elif weight.values.dim() == 2:
                assert torch.equal(whole(weight), plain[name])
            else:
                assert all(torch.equal(whole(weight.slot(slot)), plain[name][slot]) for slot in range(len(plain[name])))


def test_progress_counts_fp8_and_scales(aligned):
    calls = []
    loaded = load(aligned, Mesh(tp=2), keeps_fp8=True, progress=lambda *call: calls.append(call))
    size = sum(weight.nbytes for weight in loaded.values())
    assert calls[-1] == (size, size)


def test_nothing_is_kept_of_a_checkpoint_that_leaves_projections_out(aligned, tmp_path):
    edit_tensors(aligned, tmp_path, lambda tensors: None)
    quantization = ModelSpec.from_folder(aligned).fp8_block
    for left_out, expected in (
        (["lm_head", "model.layers.1.mlp.gate"], PROJECTIONS | EXPERTS),
        (["model.layers.1"], set()),
    ):
        config = {"quant_method": "fp8", "weight_block_size": quantization, "modules_to_not_convert": left_out}
        edit_config(tmp_path, quantization_config=config)
        assert kept(tmp_path) == expected


def test_a_weight_to_be_kept_that_is_not_fp8_is_an_error(aligned, tmp_path):
    plain = stored_tensors(aligned)[DOWN]

    def change(tensors):
        tensors[DOWN] = plain
        del tensors[f"{DOWN}_scale_inv"]

    edit_tensors(aligned, tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"{DOWN} is stored as F32, but config\.json says that it is FP8"):
        load(tmp_path, keeps_fp8=True)


@pytest.mark.parametrize("scratch", [1, 100, 2**23])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("biased", [False, True])
def test_product_equals_that_of_the_dequantized_weights(monkeypatch, scratch, tokens, biased):
    monkeypatch.setattr("ridgewalk.kernels.block_scales.SCRATCH_VALUES", scratch)
    generator = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(40, 21, generator=generator), torch.randn(40, generator=generator) if biased else None
    values, scales, product = quantize(weight)
    x = torch.randn(tokens, 21, generator=generator)
    found = block_linear(x, Fp8Weight(values, scales, FP8_BLOCK), bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, product, bias))
