"""A row-parallel matrix product: every rank holds a share of the inputs, and the partial products are summed."""

from __future__ import annotations

import torch

from ridgewalk.kernels.block_scales import Weight
from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.parallel.communicator import Communicator


class RowLinear:
    """``x W^T + bias``, summed over the ranks of a tensor-parallel group."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None, kernels: KernelSet, tp: Communicator) -> None:
        self._kernels = kernels
        self._tp = tp
        self._matrix = kernels.pack(weight)
        self._bias = bias if tp.rank == 0 else None  # enters the sum once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, inputs of this rank]`` to ``[T, outputs]``."""
        return self._tp.all_reduce(self._kernels.linear(x, self._matrix, self._bias))
