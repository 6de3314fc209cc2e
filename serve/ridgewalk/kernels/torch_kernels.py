"""Kernels in torch's own operations: the reference that others are tested against, and the fallback everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ridgewalk.kernels.block_scales import Fp8Linear, Fp8Weight, Weight, block_linear
from ridgewalk.kernels.kernel_set import DrawRules, HeadLayout, Matrix
from ridgewalk.kernels.paged import pages
from ridgewalk.kernels.torch_draw import draw_tokens
from ridgewalk.kernels.torch_experts import TorchExpertKernels
from ridgewalk.kernels.torch_latent import TorchLatentKernels


class TorchKernels(TorchExpertKernels, TorchLatentKernels):
    """`KernelSet` for any device."""

    name = "torch"
    takes_padding = False

    def __init__(self, fp8_linear: Fp8Linear = block_linear) -> None:
        """``fp8_linear``: the product with weights that are kept in FP8."""
        self._fp8_linear = fp8_linear

    def close(self) -> None:
        """See `KernelSet.close`. There are none."""

    def needs_torch_threads(self, dtype: torch.dtype) -> bool:
        """See `KernelSet.needs_torch_threads`."""
        return True

    def pack(self, weight: Weight) -> Matrix:
        """See `KernelSet.pack`."""
        return Matrix(weight, *weight.shape, packed=False)

    def linear(self, x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `KernelSet.linear`."""
        if isinstance(matrix.data, Fp8Weight):
            return self._fp8_linear(x, matrix.data, bias)
        return F.linear(x, matrix.data, bias)

    def rows(self, matrix: Matrix, indices: torch.Tensor) -> torch.Tensor:
        """See `KernelSet.rows`."""
        return F.embedding(indices, matrix.data)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `KernelSet.rms_norm`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `KernelSet.add_rms_norm`."""
        residual.add_(x)
        return self.rms_norm(residual, weight, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `KernelSet.silu_and_mul`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def arg_max(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KernelSet.arg_max`."""
        values, indices = logits.max(dim=-1)
        return values.float(), indices

    def draw(self, logits: torch.Tensor, rules: DrawRules) -> torch.Tensor:
        """See `KernelSet.draw`."""
        return draw_tokens(logits, rules)

    def rotate_and_cache(
        self,
        qkv: torch.Tensor,
        heads: HeadLayout,
        norm_weights: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """See `KernelSet.rotate_and_cache`."""
        rows = qkv.view(qkv.shape[0], -1, heads.head_dim)
        query, key, value = rows.split([heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1)
        if norm_weights is not None:
            query = self.rms_norm(query, norm_weights[0], eps)
            key = self.rms_norm(key, norm_weights[1], eps)
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        key_cache.flatten(0, 1)[slot_mapping] = _rotate(key, cos, sin)
        value_cache.flatten(0, 1)[slot_mapping] = value
        return _rotate(query, cos, sin)

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
        """See `KernelSet.attention`. Decode steps run as one padded batch, prefills one sequence at a time."""
        if max_seqlen_q == 1:
            return _decode(query, key_cache, value_cache, max_seqlen_k, scale, seqused_k, block_table)
        out = torch.empty_like(query)
        starts, used = cu_seqlens_q.tolist(), seqused_k.tolist()
        for row, (start, stop, length) in enumerate(zip(starts, starts[1:], used, strict=False)):
            if stop == start:
                continue
            keys = pages(key_cache, block_table[row], length)
            values = pages(value_cache, block_table[row], length)
            position = torch.arange(length - (stop - start), length, device=query.device)
            visible = torch.arange(length, device=query.device) <= position[:, None]
            attended = F.scaled_dot_product_attention(
                query[start:stop].transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=visible,
                scale=scale,
                enable_gqa=True,
            )
            out[start:stop] = attended[0].transpose(0, 1)
        return out


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def _decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    max_seqlen_k: int,
    scale: float,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    blocks = -(-max_seqlen_k // key_cache.shape[1])
    table = block_table[:, :blocks].long()
    visible = torch.arange(table.shape[1] * key_cache.shape[1], device=query.device) < seqused_k[:, None]
    # Slots past a sequence's end may hold anything, NaN included, and no mask hides a NaN.
    unused = ~visible[:, :, None, None]
    keys = key_cache[table].flatten(1, 2).masked_fill(unused, 0)
    values = value_cache[table].flatten(1, 2).masked_fill(unused, 0)
    attended = F.scaled_dot_product_attention(
        query.unsqueeze(2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible[:, None, None, :],
        scale=scale,
        enable_gqa=True,
    )
    return attended.squeeze(2)
