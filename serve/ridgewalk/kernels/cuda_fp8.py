"""Products with FP8 weights on CUDA: cuBLAS's block-scaled product where the machine has one that works."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType

from ridgewalk.kernels.block_scales import SCRATCH_VALUES, Fp8Linear, Fp8Weight, block_linear

logger = logging.getLogger(__name__)

BLOCK = 128
"""Rows and columns of the blocks of a weight, and values of an activation that share a scale."""

LARGEST = 448.0
"""Of e4m3."""

ROWS_MULTIPLE = 16
"""Rows of activations are padded to it: cuBLAS reads their scales in 16 bytes."""

SCALES_MULTIPLE = 4
"""Each row of a weight's scales is padded to it, as cuBLAS lays them out."""


def scaled_linear(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`Fp8Linear` with `torch.nn.functional.scaled_mm`: activations are quantized too, 128 values to a scale.

    Matrices that do not consist of whole blocks go the way of the reference.
    """
    if len(x) == 0 or any(size % BLOCK for size in weight.shape):
        return block_linear(x, weight, bias)
    out = x.new_empty((len(x), weight.shape[0]))
    rows = max(1, SCRATCH_VALUES // max(weight.shape))
    for start in range(0, len(x), rows):
        out[start : start + rows] = _scaled_product(x[start : start + rows], weight)
    return out if bias is None else out.add_(bias)


def _scaled_product(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    values, scales = quantize_rows(F.pad(x, (0, 0, 0, -len(x) % ROWS_MULTIPLE)))
    weight_scales = F.pad(weight.scales, (0, -weight.scales.shape[1] % SCALES_MULTIPLE))
    out = F.scaled_mm(
        values,
        weight.values.t(),
        scales.t().contiguous().t(),  # column by column, as cuBLAS reads them
        ScalingType.BlockWise1x128,
        weight_scales.t(),
        ScalingType.BlockWise128x128,
        output_dtype=x.dtype,
    )
    return out[: len(x)]


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values ``[T, inputs]`` and the FP32 scale of each 128 of them, ``[T, inputs / 128]``."""
    groups = x.float().unflatten(1, (-1, BLOCK))
    scales = groups.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (groups / scales[..., None]).to(torch.float8_e4m3fn).flatten(1), scales


def probe_fp8_linear(block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Fp8Linear:
    """`scaled_linear` if this machine computes with it what the reference does, else the reference."""
    if block != (BLOCK, BLOCK):
        return block_linear
    try:
        if all(_agrees(scaled_linear, tokens, dtype, device) for tokens in (1, 3, 64, 200)):
            return scaled_linear
        reason = "its results differ from the reference's"
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    logger.info("block-scaled FP8 products are not used: %s", reason)
    return block_linear


def _agrees(product: Fp8Linear, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Compare with the reference on activations that quantization leaves as they are; no two scales are alike."""
    outputs, inputs = 3 * BLOCK, 6 * BLOCK  # scales that must be padded
    generator = torch.Generator().manual_seed(0)

    def spread(*shape: int) -> torch.Tensor:
        return 2.0 ** torch.randint(-4, 5, shape, generator=generator)

    values, _ = quantize_rows(torch.randn((outputs, inputs), generator=generator))
    scales = spread(outputs // BLOCK, inputs // BLOCK) * torch.rand((3, 6), generator=generator) / inputs
    weight = Fp8Weight(values.to(device), scales.to(device), (BLOCK, BLOCK))
    rounded, _ = quantize_rows(torch.randn((tokens, inputs), generator=generator))
    factors = spread(tokens, inputs // BLOCK) / 512  # products are within FP16
    x = (rounded.float().unflatten(1, (-1, BLOCK)) * factors[..., None]).flatten(1).to(device, dtype)
    actual, expected = product(x, weight, None).float(), block_linear(x.float(), weight).float()
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    return bool((error < 1e-2).all())
