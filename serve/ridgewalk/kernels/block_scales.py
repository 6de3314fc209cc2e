"""FP8 weights with one scale for each block: the checkpoint format of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SCALE_SUFFIX = "_scale_inv"
"""What follows a weight's name in that of its scales."""

SCRATCH_VALUES = 2**23
"""Values that an FP8 product converts at once, and outputs it has beside its result: memory beyond that is none."""


@dataclass(frozen=True)
class Fp8Weight:
    """A matrix ``[outputs, inputs]`` in FP8, or one a slot; blocks begin at its first row and column."""

    values: torch.Tensor  # FP8 [..., outputs, inputs]
    scales: torch.Tensor  # FP32 [..., blocks of outputs, blocks of inputs]
    block: tuple[int, int]  # outputs, inputs

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def slot(self, index: int) -> Fp8Weight:
        """The matrix of one slot."""
        return Fp8Weight(self.values[index], self.scales[index], self.block)


Weight = torch.Tensor | Fp8Weight

Fp8Linear = Callable[[torch.Tensor, Fp8Weight, torch.Tensor | None], torch.Tensor]
"""``x W^T + bias``: ``[T, inputs]`` to ``[T, outputs]``."""


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight ``[outputs, inputs]``: one for each block, blocks at the end may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def block_range(start: int, stop: int, size: int) -> tuple[int, int]:
    """The blocks that a run of rows or columns touches, as ``(first, one past the last)``."""
    return start // size, -(-stop // size)


def dequantize(
    values: torch.Tensor, scales: torch.Tensor, start: tuple[int, int], block: tuple[int, int]
) -> torch.Tensor:
    """Weights in FP32.

    Args:
        values: a slice of the stored weight, ``[rows, columns]`` in FP8.
        scales: FP32, of exactly the blocks that the slice touches.
        start: row and column of the whole weight where the slice begins; it need not be a block's border.
        block: rows and columns of a block.
    """
    weights = values.to(torch.float32)
    columns = torch.arange(start[1], start[1] + weights.shape[1], device=values.device) // block[1]
    of_columns = scales[:, columns - start[1] // block[1]]
    offset, index = -(start[0] % block[0]), 0  # of the block within the slice
    while offset < weights.shape[0]:
        weights[max(offset, 0) : offset + block[0]] *= of_columns[index]
        offset, index = offset + block[0], index + 1
    return weights


def block_linear(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`Fp8Linear` on any device: the product with the dequantized weights, `SCRATCH_VALUES` of them at most at a time.

    Weights are rounded to the dtype of ``x``, as when they are dequantized at load.
    """
    outputs, inputs = weight.shape
    out = x.new_empty((len(x), outputs))
    if len(x) == 0:
        return out
    rows = max(1, SCRATCH_VALUES // max(inputs, len(x)))
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        first, last = block_range(start, stop, weight.block[0])
        part = dequantize(weight.values[start:stop], weight.scales[first:last], (start, 0), weight.block)
        out[:, start:stop] = F.linear(x, part.to(x.dtype), None if bias is None else bias[start:stop])
    return out
