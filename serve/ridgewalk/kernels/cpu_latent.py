"""The C++ kernels of multi-head latent attention, part of `CpuKernels`."""

from __future__ import annotations

import ctypes

import torch

from ridgewalk.kernels.cpu_calls import DTYPE_CODES, FLOAT, INT, INT64, LANES, POINTER, declare
from ridgewalk.kernels.latent_kernels import HeadMatrices
from ridgewalk.kernels.torch_latent import TorchLatentKernels


class CpuLatentKernels(TorchLatentKernels):
    """`LatentKernels` for CPU tensors. All must be contiguous, but for parts of heads and rows of ``block_table``."""

    def __init__(self, library: ctypes.CDLL, pool: int) -> None:
        self._pool = pool
        self._head_matrix_size = library.rw_head_matrix_size
        self._head_matrix_size.argtypes, self._head_matrix_size.restype = [INT64, INT64, INT], INT64
        self._pack_heads = declare(library.rw_pack_heads, [POINTER] * 2 + [INT64] * 3 + [INT, POINTER])
        self._head_linear = declare(
            library.rw_head_linear, [POINTER] * 2 + [INT64] * 2 + [POINTER] + [INT64] * 4 + [INT, POINTER]
        )
        self._latent_rotate_and_cache = declare(
            library.rw_latent_rotate_and_cache,
            [POINTER] * 2 + [INT64] * 2 + [POINTER] * 2 + [FLOAT] + [POINTER] * 4 + [INT64] * 2 + [INT] * 4 + [POINTER],
        )
        self._latent_attention = declare(
            library.rw_latent_attention, [POINTER] * 6 + [INT64] * 2 + [INT] * 4 + [FLOAT, INT, POINTER]
        )

    def pack_heads(self, weight: torch.Tensor) -> HeadMatrices:
        """See `LatentKernels.pack_heads`."""
        num_heads, num_outputs, num_inputs = weight.shape
        code = DTYPE_CODES[weight.dtype]
        size = self._head_matrix_size(num_outputs, num_inputs, code)
        if size == 0:
            return super().pack_heads(weight)
        weight = weight.contiguous()
        packed = weight.new_empty((num_heads, size))
        self._pack_heads(packed.data_ptr(), weight.data_ptr(), num_heads, num_outputs, num_inputs, code, self._pool)
        return HeadMatrices(packed, num_heads, num_outputs, num_inputs, packed=True)

    def head_linear(self, x: torch.Tensor, matrices: HeadMatrices) -> torch.Tensor:
        """See `LatentKernels.head_linear`."""
        if not matrices.packed:
            return super().head_linear(x, matrices)
        tokens = x.shape[0]
        out = x.new_empty((tokens, matrices.num_heads, matrices.num_outputs))
        self._head_linear(
            out.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            matrices.data.data_ptr(),
            tokens,
            matrices.num_heads,
            matrices.num_outputs,
            matrices.num_inputs,
            DTYPE_CODES[x.dtype],
            self._pool,
        )
        return out

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
        tokens, heads, rope = q_rope.shape
        query = q_rope.new_empty((tokens, heads, rope))
        self._latent_rotate_and_cache(
            query.data_ptr(),
            q_rope.data_ptr(),
            q_rope.stride(0),
            q_rope.stride(1),
            kv_a.data_ptr(),
            norm_weight.data_ptr(),
            eps,
            positions.data_ptr(),
            cos_sin.data_ptr(),
            cache.data_ptr(),
            slot_mapping.data_ptr(),
            tokens,
            heads,
            norm_weight.shape[0],
            rope,
            interleaved,
            DTYPE_CODES[q_rope.dtype],
            self._pool,
        )
        return query

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
        tokens, num_heads, width = query.shape
        if width % LANES or value_dim % LANES:
            return super().latent_attention(
                query,
                cache,
                cu_seqlens_q,
                max_seqlen_q,
                max_seqlen_k,
                value_dim=value_dim,
                scale=scale,
                seqused_k=seqused_k,
                block_table=block_table,
            )
        out = query.new_empty((tokens, num_heads, value_dim))
        self._latent_attention(
            out.data_ptr(),
            query.data_ptr(),
            cache.data_ptr(),
            cu_seqlens_q.data_ptr(),
            seqused_k.data_ptr(),
            block_table.data_ptr(),
            block_table.stride(0),
            seqused_k.shape[0],
            num_heads,
            width,
            value_dim,
            cache.shape[1],
            scale,
            DTYPE_CODES[query.dtype],
            self._pool,
        )
        return out
