"""The operations of multi-head latent attention (MLA, arXiv 2405.04434, section 2.1), part of `KernelSet`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class LatentLayout:
    """Heads of one rank, and the latent that they share."""

    num_heads: int
    value_dim: int  # the latent's own width, which is what heads read
    rope_dim: int

    @property
    def latent_dim(self) -> int:
        """Width of a token in the cache."""
        return self.value_dim + self.rope_dim


@dataclass(frozen=True)
class HeadMatrices:
    """One matrix a head, laid out as the kernel set that made them wants them."""

    data: torch.Tensor
    num_heads: int
    num_outputs: int  # of each head
    num_inputs: int
    packed: bool  # False: `data` is ``[num_heads, num_outputs, num_inputs]``


class LatentKernels(Protocol):
    """Kernels of MLA in absorbed form. The cache holds a token's normalised latent, then its rotated rope key."""

    def pack_heads(self, weight: torch.Tensor) -> HeadMatrices:
        """Lay out ``[num_heads, num_outputs, num_inputs]`` weights for `head_linear`; done once, at load."""

    def head_linear(self, x: torch.Tensor, matrices: HeadMatrices) -> torch.Tensor:
        """Each head by its own matrix: ``[T, num_heads, num_inputs]`` to ``[T, num_heads, num_outputs]``.

        The last axis of ``x`` is contiguous; a part of a wider head may be given.
        """

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
        """Normalise latents, rotate queries and the shared key, and write latent and key to the cache.

        Args:
            q_rope: ``[T, heads, rope]``: the rotated part of queries; may be a part of wider heads.
            kv_a: ``[T, kv_lora + rope]``: latent, then key.
            norm_weight: ``[kv_lora]``: RMS norm of the latent.
            eps: of that norm.
            positions: int64 ``[T]``.
            cos_sin: FP32 ``[max_model_len, rope]``: cosines of the rope / 2 angles, then sines.
            cache: ``[num_blocks, block_size, kv_lora + rope]``.
            slot_mapping: int64 ``[T]``: block * block_size + offset in the block.
            interleaved: neighbours are rotated against each other, and all first ones come out before all second ones;
                otherwise the first half is rotated against the second. Scores do not notice the order.

        Returns:
            Rotated queries, ``[T, heads, rope]``.
        """

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
        """Causal attention of all heads over one key a token, whose first ``value_dim`` elements are the value.

        Args:
            query: ``[T, heads, latent_dim]``, absorbed: ``W_uk^T q_nope``, then the rotated part.
            cache: ``[num_blocks, block_size, latent_dim]``.
            cu_seqlens_q, max_seqlen_q, max_seqlen_k, scale, seqused_k, block_table: as `KernelSet.attention` has them.
            value_dim: width of the values.

        Returns:
            ``[T, heads, value_dim]``.
        """
