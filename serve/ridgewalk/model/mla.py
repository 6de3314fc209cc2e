"""Multi-head latent attention (MLA, arXiv 2405.04434, section 2.1) on one tensor-parallel rank."""

from __future__ import annotations

import torch

from ridgewalk.kernels.block_scales import Weight
from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.kernels.latent_kernels import LatentLayout
from ridgewalk.model.batch import StepTensors
from ridgewalk.model.kv_cache import LatentCache
from ridgewalk.model.row_linear import RowLinear
from ridgewalk.parallel.communicator import Communicator
from ridgewalk.placement.model_spec import ModelSpec


class LatentAttention:
    """Keys and values of all heads come from one latent a token, which is all that the cache holds.

    It runs in absorbed form: a head's query goes through ``W_uk`` once instead of every cached latent, and what the
    heads read is latents, which go through ``W_uv`` afterwards. Latents are computed, and cached, by every rank; heads
    are divided.
    """

    def __init__(self, spec: ModelSpec, parameters: dict[str, Weight], kernels: KernelSet, tp: Communicator) -> None:
        assert spec.mla is not None
        self._kernels = kernels
        self._mla = spec.mla
        self._num_heads = spec.num_heads_per_rank(tp.size)
        lora = spec.mla.q_lora_rank > 0
        self._q_a = kernels.pack(parameters.pop("q_a")) if lora else None
        self._q_a_norm = parameters.get("q_a_norm")
        self._q = kernels.pack(parameters.pop("q_b" if lora else "q"))
        self._kv_a = kernels.pack(parameters.pop("kv_a"))
        self._kv_a_norm = parameters["kv_a_norm"]
        kv_b = parameters.pop("kv_b").unflatten(0, (self._num_heads, -1))
        key, value = kv_b.split([spec.mla.qk_nope_head_dim, spec.mla.v_head_dim], dim=1)
        self._absorb_key = kernels.pack_heads(key.transpose(1, 2).contiguous())
        self._expand_value = kernels.pack_heads(value.contiguous())
        self._o = RowLinear(parameters.pop("o"), None, kernels, tp)

    def forward(
        self, hidden: torch.Tensor, step: StepTensors, cos_sin: torch.Tensor, cache: LatentCache
    ) -> torch.Tensor:
        """``[T, hidden]`` to ``[T, hidden]``, summed over ranks."""
        attended = self._kernels.latent_attention(
            self._query_and_cache(hidden, step, cos_sin, cache),
            cache.latent,
            step.cu_seqlens_q,
            step.max_seqlen_q,
            step.max_seqlen_k,
            value_dim=self._mla.kv_lora_rank,
            scale=self._mla.softmax_scale,
            seqused_k=step.seqused_k,
            block_table=step.block_table,
        )
        values = self._kernels.head_linear(attended, self._expand_value)
        return self._o.forward(values.flatten(1))

    def _query_and_cache(
        self, hidden: torch.Tensor, step: StepTensors, cos_sin: torch.Tensor, cache: LatentCache
    ) -> torch.Tensor:
        """Absorbed queries ``[T, heads, latent_dim]``; writes the tokens' latents and rope keys to the cache."""
        kernels, mla = self._kernels, self._mla
        query = kernels.linear(self._compress(hidden), self._q).view(-1, self._num_heads, mla.qk_head_dim)
        q_nope, q_rope = query.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        rotated = kernels.latent_rotate_and_cache(
            q_rope,
            kernels.linear(hidden, self._kv_a),
            self._kv_a_norm,
            mla.norm_eps,
            step.positions,
            cos_sin,
            cache.latent,
            step.slot_mapping,
            mla.rope_interleave,
        )
        return torch.cat((kernels.head_linear(q_nope, self._absorb_key), rotated), dim=-1)

    def _compress(self, hidden: torch.Tensor) -> torch.Tensor:
        """The latent that queries are made of; the hidden state itself where the model has none."""
        if self._q_a is None or self._q_a_norm is None:
            return hidden
        return self._kernels.rms_norm(self._kernels.linear(hidden, self._q_a), self._q_a_norm, self._mla.norm_eps)


def rank_latents(spec: ModelSpec, tp: int) -> LatentLayout:
    """Heads of one tensor-parallel rank of a model that caches latents."""
    assert spec.mla is not None
    return LatentLayout(spec.num_heads_per_rank(tp), spec.mla.kv_lora_rank, spec.mla.qk_rope_head_dim)
