"""Choosing the product with FP8 weights on CUDA: it is used only after it has shown the reference's results."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import ScalingType

from ridgewalk.kernels import cuda_fp8
from ridgewalk.kernels.block_scales import Fp8Weight, block_linear, dequantize
from ridgewalk.kernels.cuda_fp8 import probe_fp8_linear, quantize_rows, scaled_linear

CPU = torch.device("cpu")
BLOCK = (128, 128)


def stand_in(change=lambda out: out):
    """What cuBLAS computes, on the CPU; ``change`` is made to its result."""

    def scaled_mm(x, weight, x_scales, x_recipe, weight_scales, weight_recipe, output_dtype):
        assert (x_recipe, weight_recipe) == (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
        inputs = (x.float().unflatten(1, (-1, 128)) * x_scales[..., None]).flatten(1)
        used = weight_scales.t()[:, : weight.shape[0] // 128]
        return change(inputs @ dequantize(weight.t(), used, (0, 0), BLOCK).t()).to(output_dtype)

    return scaled_mm


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def random_weight(outputs, inputs):
    values, _ = quantize_rows(normal(outputs, -(-inputs // 128) * 128))
    scales = normal(-(-outputs // 128), -(-inputs // 128)).abs() / inputs
    return Fp8Weight(values[:, :inputs], scales, BLOCK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_product_that_agrees_is_used(monkeypatch, dtype):
    monkeypatch.setattr("torch.nn.functional.scaled_mm", stand_in())
    assert probe_fp8_linear(BLOCK, dtype, CPU) is scaled_linear


@pytest.mark.parametrize("change", [lambda out: out * 1.1, lambda out: out.flip(1), lambda out: out * torch.nan])
def test_product_that_differs_is_not_used(monkeypatch, change):
    monkeypatch.setattr("torch.nn.functional.scaled_mm", stand_in(change))
    assert probe_fp8_linear(BLOCK, torch.bfloat16, CPU) is block_linear


def test_product_that_mixes_up_scales_is_not_used(monkeypatch):
    right = stand_in()

    def wrong(x, weight, x_scales, x_recipe, weight_scales, *others, **options):
        return right(x, weight, x_scales, x_recipe, weight_scales.flip(1), *others, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_mm", wrong)
    assert probe_fp8_linear(BLOCK, torch.bfloat16, CPU) is block_linear


def test_product_that_fails_is_not_used(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("torch.nn.functional.scaled_mm", fail)
    assert probe_fp8_linear(BLOCK, torch.bfloat16, CPU) is block_linear


def test_other_blocks_are_not_tried(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.scaled_mm", stand_in())
    assert probe_fp8_linear((64, 128), torch.bfloat16, CPU) is block_linear


@pytest.mark.parametrize("scratch", [2**9, 2**23])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 16, 33])
def test_product_is_near_that_of_the_weights(monkeypatch, tokens, biased, scratch):
    """Activations lose what FP8 cannot hold: 3 bits of mantissa."""
    monkeypatch.setattr("torch.nn.functional.scaled_mm", stand_in())
    monkeypatch.setattr(cuda_fp8, "SCRATCH_VALUES", scratch)
    weight, x = random_weight(256, 384), normal(tokens, 384)
    bias = normal(256) if biased else None
    actual, expected = scaled_linear(x, weight, bias), block_linear(x, weight, bias)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 0.05 * expected.norm()


def test_matrices_that_end_within_a_block_take_the_reference(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.scaled_mm", None)
    weight, x = random_weight(192, 256), normal(3, 256)
    assert torch.equal(scaled_linear(x, weight), block_linear(x, weight))


def test_rows_of_zeros_stay_zero():
    values, scales = quantize_rows(torch.zeros(2, 256))
    assert not values.float().any()
    assert scales.isfinite().all()


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 384, 768), (3, 128, 128), (200, 2048, 7168)])
def test_layouts_are_those_that_torch_asks_for_on_cuda(tokens, outputs, inputs):
    """Tensors without data go through torch's checks of shapes and strides for CUDA."""
    values = torch.empty((outputs, inputs), dtype=torch.float8_e4m3fn, device="meta")
    scales = torch.empty((outputs // 128, inputs // 128), device="meta")
    x = torch.empty((tokens, inputs), dtype=torch.bfloat16, device="meta")
    assert scaled_linear(x, Fp8Weight(values, scales, BLOCK)).shape == (tokens, outputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hopper_multiplies_fp8():
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("cuBLAS multiplies blocks of 128 on compute capability 9.0 alone")
    assert probe_fp8_linear(BLOCK, torch.bfloat16, device) is scaled_linear
