"""FP8 weights with one scale for each block: the checkpoint format of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2)."""

from __future__ import annotations

import torch

SCALE_SUFFIX = "_scale_inv"
"""What follows a weight's name in that of its scales."""


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
    columns = torch.arange(start[1], start[1] + weights.shape[1]) // block[1] - start[1] // block[1]
    of_columns = scales[:, columns]
    offset, index = -(start[0] % block[0]), 0  # of the block within the slice
    while offset < weights.shape[0]:
        weights[max(offset, 0) : offset + block[0]] *= of_columns[index]
        offset, index = offset + block[0], index + 1
    return weights
