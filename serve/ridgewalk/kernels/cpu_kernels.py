"""`KernelSet` on the compiled C++ kernels. Raw pointers go through ctypes, which releases the GIL."""

from __future__ import annotations

import ctypes
import weakref

import torch

from ridgewalk.kernels.block_scales import Fp8Weight, Weight
from ridgewalk.kernels.cpu_calls import DTYPE_CODES, FLOAT, INT, INT64, LANES, POINTER, declare
from ridgewalk.kernels.cpu_experts import CpuExpertKernels
from ridgewalk.kernels.cpu_latent import CpuLatentKernels
from ridgewalk.kernels.kernel_set import DrawRules, HeadLayout, Matrix
from ridgewalk.kernels.torch_kernels import TorchKernels


class CpuKernels(CpuExpertKernels, CpuLatentKernels):
    """Kernels for CPU tensors. All tensors must be contiguous, but for rows of ``block_table``."""

    name = "cpu"
    takes_padding = False

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._reference = TorchKernels()
        library.rw_pool_create.restype = POINTER
        self._pool = library.rw_pool_create(num_threads)
        CpuExpertKernels.__init__(self, library, self._pool)
        CpuLatentKernels.__init__(self, library, self._pool)
        self._end_threads = weakref.finalize(self, library.rw_pool_destroy, POINTER(self._pool))
        self._packed_size = library.rw_packed_size
        self._packed_size.argtypes, self._packed_size.restype = [INT64, INT64, INT], INT64
        rows = [INT64] * 2 + [INT, POINTER]  # rows, width, dtype, pool
        attention = [POINTER] * 7 + [INT64] * 2 + [INT] * 4 + [FLOAT, INT, POINTER]
        self._pack = declare(library.rw_pack, [POINTER] * 2 + rows)
        self._linear = declare(library.rw_linear, [POINTER] * 4 + [INT64] + rows)
        self._unpack_rows = declare(library.rw_unpack_rows, [POINTER] * 3 + rows)
        self._rms_norm = declare(library.rw_rms_norm, [POINTER] * 4 + [FLOAT, INT64, INT, INT, POINTER])
        self._silu_and_mul = declare(library.rw_silu_and_mul, [POINTER] * 2 + [INT64, INT, INT, POINTER])
        self._arg_max = declare(library.rw_arg_max, [POINTER] * 3 + rows)
        self._draw = declare(library.rw_draw, [POINTER] * 7 + [INT64] * 3 + [INT, POINTER])
        self._rotate_and_cache = declare(
            library.rw_rotate_and_cache,
            [POINTER] * 4 + [FLOAT] + [POINTER] * 5 + [INT64] + [INT] * 4 + [POINTER],
        )
        self._decode_attention = declare(library.rw_decode_attention, attention)
        self._prefill_attention = declare(library.rw_prefill_attention, attention)

    def close(self) -> None:
        """See `KernelSet.close`."""
        self._end_threads()

    def needs_torch_threads(self, dtype: torch.dtype) -> bool:
        """See `KernelSet.needs_torch_threads`."""
        return self._packed_size(32, 32, DTYPE_CODES[dtype]) == 0

    def pack(self, weight: Weight) -> Matrix:
        """See `KernelSet.pack`. Repacked where our product is faster than oneDNN's."""
        if isinstance(weight, Fp8Weight):
            return self._reference.pack(weight)
        outputs, inputs = weight.shape
        size = self._packed_size(outputs, inputs, DTYPE_CODES[weight.dtype])
        if size == 0:
            return self._reference.pack(weight)
        packed = weight.new_empty(size)
        code = DTYPE_CODES[weight.dtype]
        self._pack(packed.data_ptr(), weight.data_ptr(), outputs, inputs, code, self._pool)
        return Matrix(packed, outputs, inputs, packed=True)

    def linear(self, x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `KernelSet.linear`."""
        if not matrix.packed:
            return self._reference.linear(x, matrix, bias)
        tokens = x.shape[0]
        out = x.new_empty((tokens, matrix.num_outputs))
        self._linear(
            out.data_ptr(),
            x.data_ptr(),
            matrix.data.data_ptr(),
            None if bias is None else bias.data_ptr(),
            tokens,
            matrix.num_outputs,
            matrix.num_inputs,
            DTYPE_CODES[x.dtype],
            self._pool,
        )
        return out

    def rows(self, matrix: Matrix, indices: torch.Tensor) -> torch.Tensor:
        """See `KernelSet.rows`."""
        if not matrix.packed:
            return self._reference.rows(matrix, indices)
        out = matrix.data.new_empty((len(indices), matrix.num_inputs))
        self._unpack_rows(
            out.data_ptr(),
            matrix.data.data_ptr(),
            indices.data_ptr(),
            len(indices),
            matrix.num_inputs,
            DTYPE_CODES[out.dtype],
            self._pool,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `KernelSet.rms_norm`."""
        return self._norm(x, None, weight, eps)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `KernelSet.add_rms_norm`."""
        return self._norm(x, residual, weight, eps)

    def _norm(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        rows, width = x.shape
        self._rms_norm(
            out.data_ptr(),
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            eps,
            rows,
            width,
            DTYPE_CODES[x.dtype],
            self._pool,
        )
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `KernelSet.silu_and_mul`."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, width))
        self._silu_and_mul(out.data_ptr(), gate_up.data_ptr(), rows, width, DTYPE_CODES[gate_up.dtype], self._pool)
        return out

    def draw(self, logits: torch.Tensor, rules: DrawRules) -> torch.Tensor:
        """See `KernelSet.draw`."""
        rows, vocab_size = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        self._draw(
            tokens.data_ptr(),
            logits.data_ptr(),
            rules.temperature.data_ptr(),
            rules.top_k.data_ptr(),
            rules.top_p.data_ptr(),
            rules.min_p.data_ptr(),
            rules.uniform.data_ptr(),
            rows,
            vocab_size,
            logits.stride(0),
            DTYPE_CODES[logits.dtype],
            self._pool,
        )
        return tokens

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
        tokens = qkv.shape[0]
        query = qkv.new_empty((tokens, heads.num_heads, heads.head_dim))
        self._rotate_and_cache(
            query.data_ptr(),
            qkv.data_ptr(),
            norm_weights[0].data_ptr() if norm_weights else None,
            norm_weights[1].data_ptr() if norm_weights else None,
            eps,
            positions.data_ptr(),
            cos_sin.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slot_mapping.data_ptr(),
            tokens,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            DTYPE_CODES[qkv.dtype],
            self._pool,
        )
        return query

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
        _, num_heads, head_dim = query.shape
        if head_dim % LANES:
            return self._reference.attention(
                query,
                key_cache,
                value_cache,
                cu_seqlens_q,
                max_seqlen_q,
                max_seqlen_k,
                scale=scale,
                seqused_k=seqused_k,
                block_table=block_table,
            )
        out = torch.empty_like(query)
        _, block_size, num_kv_heads, _ = key_cache.shape
        arguments = (
            out.data_ptr(),
            query.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            cu_seqlens_q.data_ptr(),
            seqused_k.data_ptr(),
            block_table.data_ptr(),
            block_table.stride(0),
            seqused_k.shape[0],
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            scale,
            DTYPE_CODES[query.dtype],
            self._pool,
        )
        self._decode_attention(*arguments)  # each takes the sequences that are its own
        if max_seqlen_q > 1:
            self._prefill_attention(*arguments)
        return out

    def arg_max(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KernelSet.arg_max`."""
        rows, width = logits.shape
        indices = torch.empty(rows, dtype=torch.int64)
        values = torch.empty(rows, dtype=torch.float32)
        self._arg_max(
            indices.data_ptr(),
            values.data_ptr(),
            logits.data_ptr(),
            rows,
            width,
            DTYPE_CODES[logits.dtype],
            self._pool,
        )
        return values, indices
