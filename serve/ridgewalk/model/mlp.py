"""The feed-forward block of a dense layer on one tensor-parallel rank."""

from __future__ import annotations

import torch

from ridgewalk.kernels.block_scales import Weight
from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.model.row_linear import RowLinear
from ridgewalk.parallel.communicator import Communicator


class MLP:
    """SwiGLU (arXiv 2002.05202): gate and up are column-parallel in one matrix, down is row-parallel."""

    def __init__(self, parameters: dict[str, Weight], kernels: KernelSet, tp: Communicator) -> None:
        self._kernels = kernels
        self._gate_up, self._gate_up_bias = kernels.pack(parameters.pop("gate_up")), parameters.get("gate_up_bias")
        self._down = RowLinear(parameters.pop("down"), parameters.get("down_bias"), kernels, tp)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[T, hidden]`` to ``[T, hidden]``, summed over ranks."""
        gate_up = self._kernels.linear(hidden, self._gate_up, self._gate_up_bias)
        return self._down.forward(self._kernels.silu_and_mul(gate_up))
