"""`KernelSet` for CUDA: torch's operations, with paged FlashAttention where the machine has one that works."""

from __future__ import annotations

import logging

import torch
from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls
from torch.nn.attention.varlen import varlen_attn

from ridgewalk.kernels.block_scales import Fp8Linear, block_linear
from ridgewalk.kernels.kernel_set import HeadLayout
from ridgewalk.kernels.torch_kernels import TorchKernels

logger = logging.getLogger(__name__)


class VarlenKernels(TorchKernels):
    """`TorchKernels` whose attention is `varlen_attn` over the block table. Make it with `probe_varlen` only."""

    name = "varlen"

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
        out = varlen_attn(
            query,
            key_cache,
            value_cache,
            cu_seqlens_q,
            None,
            max_seqlen_q,
            max_seqlen_k,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=seqused_k,
            block_table=block_table,
        )
        assert isinstance(out, torch.Tensor)
        return out


def probe_varlen(
    heads: HeadLayout,
    dtype: torch.dtype,
    block_size: int,
    device: torch.device,
    fp8_linear: Fp8Linear = block_linear,
) -> TorchKernels:
    """`VarlenKernels` if a FlashAttention of this machine computes what the reference does, else the reference.

    Paged `varlen_attn` needs FlashAttention 3 or 4, which torch activates on request; each that is registered is tried.
    """
    for implementation in reversed(list_flash_attention_impls()):
        try:
            activate_flash_attention_impl(implementation)
            if _agrees(VarlenKernels(), heads, dtype, block_size, device):
                return VarlenKernels(fp8_linear)
            reason = "its results differ from the reference's"
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.info("%s is not used for attention: %s", implementation, reason)
    return TorchKernels(fp8_linear)


def _agrees(
    kernels: TorchKernels, heads: HeadLayout, dtype: torch.dtype, block_size: int, device: torch.device
) -> bool:
    """Compare a prefill beside a decode step with the reference."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    keys, values = (normal(8, block_size, heads.num_kv_heads, heads.head_dim) for _ in range(2))
    query = normal(4, heads.num_heads, heads.head_dim)
    used = torch.tensor([block_size + 1, 3 * block_size - 1], dtype=torch.int32, device=device)
    table = torch.tensor([[6, 1, 0], [3, 0, 7]], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 3, 4], dtype=torch.int32, device=device)
    arguments = (query, keys, values, starts, 3, 3 * block_size - 1)
    options = {"scale": heads.head_dim**-0.5, "seqused_k": used, "block_table": table}
    actual, expected = (k.attention(*arguments, **options).float() for k in (kernels, TorchKernels()))
    return bool(torch.allclose(actual, expected, rtol=2e-2, atol=2e-2))
