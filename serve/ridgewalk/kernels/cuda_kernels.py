"""`KernelSet` for CUDA: layers and attention in Triton, products and the rest in torch's operations."""

from __future__ import annotations

import torch

from ridgewalk.kernels import triton_attention, triton_draw, triton_layer
from ridgewalk.kernels.torch_kernels import TorchKernels


class TritonKernels(TorchKernels):
    """`TorchKernels` but for what Triton does in fewer passes over memory. Make it with `probe_triton` only.

    A slot below zero is not written by `rotate_and_cache`, and a sequence of no keys attends to nothing: so are rows
    that pad a captured step. (`latent_rotate_and_cache` is torch's, for which -1 is the last slot.)
    """

    name = "triton"
    takes_padding = True

    rms_norm = staticmethod(triton_layer.rms_norm)
    add_rms_norm = staticmethod(triton_layer.add_rms_norm)
    silu_and_mul = staticmethod(triton_layer.silu_and_mul)
    rotate_and_cache = staticmethod(triton_layer.rotate_and_cache)
    draw = staticmethod(triton_draw.draw_tokens)

    def attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        scale: float,
        seqused_k: torch.Tensor,
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        """See `KernelSet.attention`."""
        return triton_attention.paged_attention(
            query,
            key_cache,
            value_cache,
            cu_seqlens_q,
            max_seqlen_q,
            max_seqlen_k,
            value_dim=query.shape[2],
            scale=scale,
            seqused_k=seqused_k,
            block_table=block_table,
        )

    def latent_attention(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        value_dim: int,
        scale: float,
        seqused_k: torch.Tensor,
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        """See `LatentKernels.latent_attention`."""
        return triton_attention.paged_attention(
            query,
            cache.unsqueeze(2),
            None,
            cu_seqlens_q,
            max_seqlen_q,
            max_seqlen_k,
            value_dim=value_dim,
            scale=scale,
            seqused_k=seqused_k,
            block_table=block_table,
        )
