"""The operations of decoder layers, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ridgewalk.kernels.block_scales import Weight
from ridgewalk.kernels.expert_kernels import ExpertKernels
from ridgewalk.kernels.latent_kernels import LatentKernels


@dataclass(frozen=True)
class HeadLayout:
    """Heads of one rank: a row of a merged qkv projection is ``num_heads`` queries, then keys, then values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def q_size(self) -> int:
        """Width of the queries in a row of qkv."""
        return self.num_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of a row of qkv."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class Matrix:
    """Weights of a matrix product, laid out as the kernel set that made them wants them."""

    data: Weight
    num_outputs: int
    num_inputs: int
    packed: bool  # False: `data` is ``[num_outputs, num_inputs]``; FP8 is never packed


@dataclass(frozen=True)
class DrawRules:
    """How each row of logits is sampled; 1-D CPU tensors of one length."""

    temperature: torch.Tensor  # FP32; 0 takes the greatest logit
    top_k: torch.Tensor  # int64; 0 is off
    top_p: torch.Tensor  # FP64; 1 is off
    min_p: torch.Tensor  # FP64; 0 is off
    uniform: torch.Tensor  # FP64 in [0, 1): where in the cumulative distribution the token lies

    def rows(self, indices: list[int], device: torch.device) -> DrawRules:
        """Those of some rows, on a device."""
        fields = (self.temperature, self.top_k, self.top_p, self.min_p, self.uniform)
        return DrawRules(*(field[indices].to(device) for field in fields))


class KernelSet(ExpertKernels, LatentKernels, Protocol):
    """Kernels of one device. ``T`` is the tokens of the step, over all its sequences, one after the other."""

    name: str
    takes_padding: bool  # whether `rotate_and_cache` and `attention` take rows of no sequence: slot -1, no keys

    def close(self) -> None:
        """End the threads. Nothing may be called any more."""

    def needs_torch_threads(self, dtype: torch.dtype) -> bool:
        """True when torch's own operations do the heavy work; else its threads would only get in the way of ours."""

    def pack(self, weight: Weight) -> Matrix:
        """Lay out ``[num_outputs, num_inputs]`` weights for `linear` and `rows`; done once, at load."""

    def linear(self, x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x W^T + bias``: ``[T, num_inputs]`` to ``[T, num_outputs]``, summed in FP32."""

    def rows(self, matrix: Matrix, indices: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix by int64 indices ``[T]``: an embedding that may share the head's matrix."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis, in FP32 (arXiv 1910.07467). ``[T, hidden]``."""

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``residual += x`` in place, then `rms_norm` of the sum. All ``[T, hidden]``."""

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` of ``[T, 2 * n]``, gate first: ``[T, n]``."""

    def arg_max(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """FP32 values and int64 indices of the greatest of each row, the first among equals. ``[rows, n]``."""

    def draw(self, logits: torch.Tensor, rules: DrawRules) -> torch.Tensor:
        """One token a row: temperature, top-k, top-p over what top-k left, min-p, then an inverse CDF.

        Top-p keeps the fewest tokens whose mass reaches it, min-p those of at least that share of the greatest. Equal
        logits are ordered by id, the cumulative distribution by the vocabulary. A row does not depend on others.

        Args:
            logits: ``[rows, vocab_size]``; the last axis contiguous.
            rules: of every row.

        Returns:
            Token ids, int64 ``[rows]``.
        """

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
        """Normalise and rotate queries and keys, and write keys and values to the cache.

        Args:
            qkv: ``[T, qkv_size]``; may be overwritten.
            heads: how a row of ``qkv`` divides.
            norm_weights: RMS norm over each head of q and of k (``[head_dim]`` each) before the rotation, or None.
            eps: of that norm.
            positions: int64 ``[T]``.
            cos_sin: FP32 ``[max_model_len, head_dim]``: cosines of the head_dim / 2 angles, then sines. The first
                half of a head is rotated against the second (the layout of Hugging Face checkpoints).
            key_cache, value_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``.
            slot_mapping: int64 ``[T]``: block * block_size + offset in the block.

        Returns:
            Rotated queries, ``[T, num_heads, head_dim]``.
        """

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
        """Causal attention over paged keys and values, as `torch.nn.attention.varlen.varlen_attn` with window (-1, 0).

        The queries of a sequence are its last positions: query i of n sees the first ``seqused_k - n + i + 1`` keys.

        Args:
            query: ``[T, num_heads, head_dim]``.
            key_cache, value_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``.
            cu_seqlens_q: int32 ``[num_seqs + 1]``: where the queries of each sequence begin.
            max_seqlen_q, max_seqlen_k: longest of each in the batch.
            scale: of the scores.
            seqused_k: int32 ``[num_seqs]``: keys of each sequence, those of this step included.
            block_table: int32 ``[num_seqs, max_blocks]``.

        Returns:
            ``[T, num_heads, head_dim]``.
        """
