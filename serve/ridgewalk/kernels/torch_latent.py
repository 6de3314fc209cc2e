"""The kernels of multi-head latent attention in torch's operations: the reference."""

from __future__ import annotations

import torch

from ridgewalk.kernels.latent_kernels import HeadMatrices
from ridgewalk.kernels.paged import pages

MOST = 1 << 26
"""FP32 elements (scores, or widened latents) that are held at once; what needs more goes through in blocks."""


class TorchLatentKernels:
    """`LatentKernels` for any device."""

    def pack_heads(self, weight: torch.Tensor) -> HeadMatrices:
        """See `LatentKernels.pack_heads`."""
        return HeadMatrices(weight, *weight.shape, packed=False)

    def head_linear(self, x: torch.Tensor, matrices: HeadMatrices) -> torch.Tensor:
        """See `LatentKernels.head_linear`."""
        return torch.einsum("tha,hba->thb", x, matrices.data)

    def latent_rotate_and_cache(
        self,
        q_rope: torch.Tensor,
        kv_a: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        interleaved: bool,
    ) -> torch.Tensor:
        """See `LatentKernels.latent_rotate_and_cache`."""
        latent, key = kv_a.split([len(norm_weight), q_rope.shape[2]], dim=-1)
        wide = latent.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        cos, sin = cos_sin[positions].chunk(2, dim=-1)
        rows = torch.cat((norm_weight * wide.to(latent.dtype), _rotate(key, cos, sin, interleaved)), dim=-1)
        cache.flatten(0, 1)[slot_mapping] = rows
        return _rotate(q_rope, cos[:, None], sin[:, None], interleaved)

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
        """See `LatentKernels.latent_attention`. In FP32; decode steps run as padded batches, prefills one by one."""
        if max_seqlen_q == 1:
            return _decode(query, cache, max_seqlen_k, value_dim, scale, seqused_k, block_table)
        out = query.new_empty((*query.shape[:2], value_dim))
        starts, used = cu_seqlens_q.tolist(), seqused_k.tolist()
        for row, (start, stop, length) in enumerate(zip(starts, starts[1:], used, strict=False)):
            if stop == start:
                continue
            keys = pages(cache, block_table[row], length).float()
            block = max(1, MOST // (query.shape[1] * length))
            for first in range(start, stop, block):
                last = min(first + block, stop)
                positions = torch.arange(length - stop + first, length - stop + last, device=query.device)
                hidden = torch.arange(length, device=query.device) > positions[:, None]
                scores = torch.einsum("qhd,kd->hqk", query[first:last].float(), keys) * scale
                shares = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
                out[first:last] = torch.einsum("hqk,kd->qhd", shares, keys[:, :value_dim])
        return out


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    wide = x.float()
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    max_seqlen_k: int,
    value_dim: int,
    scale: float,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    table = block_table[:, : -(-max_seqlen_k // cache.shape[1])].long()
    length = table.shape[1] * cache.shape[1]
    out = query.new_empty((*query.shape[:2], value_dim))
    block = max(1, MOST // (length * cache.shape[2]))
    for first in range(0, len(query), block):
        rows = slice(first, first + block)
        unused = torch.arange(length, device=query.device) >= seqused_k[rows, None]
        # Slots past a sequence's end may hold anything, NaN included, and no mask hides a NaN.
        keys = cache[table[rows]].flatten(1, 2).float().masked_fill(unused[:, :, None], 0)
        scores = torch.bmm(query[rows].float(), keys.transpose(1, 2)) * scale
        shares = scores.masked_fill(unused[:, None], -torch.inf).softmax(dim=-1)
        out[rows] = torch.bmm(shares, keys[:, :, :value_dim])
    return out
