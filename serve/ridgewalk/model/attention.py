"""Grouped-query attention on one tensor-parallel rank."""

from __future__ import annotations

import torch

from ridgewalk.kernels.block_scales import Weight
from ridgewalk.kernels.kernel_set import HeadLayout, KernelSet
from ridgewalk.model.batch import StepTensors
from ridgewalk.model.kv_cache import LayerCache
from ridgewalk.model.row_linear import RowLinear
from ridgewalk.parallel.communicator import Communicator
from ridgewalk.placement.model_spec import ModelSpec


class Attention:
    """Queries, keys and values are one matrix, column-parallel by heads; the output projection is row-parallel."""

    def __init__(self, spec: ModelSpec, parameters: dict[str, Weight], kernels: KernelSet, tp: Communicator) -> None:
        self._kernels = kernels
        self._heads = rank_heads(spec, tp.size)
        self._eps = spec.rms_norm_eps
        self._scale = spec.head_dim**-0.5
        self._qkv, self._qkv_bias = kernels.pack(parameters.pop("qkv")), parameters.get("qkv_bias")
        self._o = RowLinear(parameters.pop("o"), parameters.get("o_bias"), kernels, tp)
        self._norms = (parameters["q_norm"], parameters["k_norm"]) if spec.qk_norm else None

    def forward(
        self, hidden: torch.Tensor, step: StepTensors, cos_sin: torch.Tensor, cache: LayerCache
    ) -> torch.Tensor:
        """``[T, hidden]`` to ``[T, hidden]``, summed over ranks."""
        qkv = self._kernels.linear(hidden, self._qkv, self._qkv_bias)
        query = self._kernels.rotate_and_cache(
            qkv, self._heads, self._norms, self._eps, step.positions, cos_sin, cache.key, cache.value, step.slot_mapping
        )
        attended = self._kernels.attention(
            query,
            cache.key,
            cache.value,
            step.cu_seqlens_q,
            step.max_seqlen_q,
            step.max_seqlen_k,
            scale=self._scale,
            seqused_k=step.seqused_k,
            block_table=step.block_table,
        )
        return self._o.forward(attended.flatten(1))


def rank_heads(spec: ModelSpec, tp: int) -> HeadLayout:
    """Heads of one tensor-parallel rank."""
    return HeadLayout(spec.num_heads_per_rank(tp), spec.num_kv_heads_per_rank(tp), spec.head_dim)
