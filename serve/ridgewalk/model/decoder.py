"""The dense decoder of Llama, Mistral, Qwen2 and Qwen3 on one tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ridgewalk.kernels.kernel_set import HeadLayout, KernelSet
from ridgewalk.model.batch import StepTensors
from ridgewalk.model.phase_clock import PhaseClock
from ridgewalk.model.rope import rope_table
from ridgewalk.parallel.communicator import Communicator
from ridgewalk.placement.model_spec import ModelSpec


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each ``[num_blocks, block_size, num_kv_heads, head_dim]``."""

    key: torch.Tensor
    value: torch.Tensor


class Attention:
    """Grouped-query attention: qkv is column-parallel by heads, the output projection row-parallel."""

    def __init__(
        self, spec: ModelSpec, parameters: dict[str, torch.Tensor], kernels: KernelSet, tp: Communicator
    ) -> None:
        self._kernels = kernels
        self._tp = tp
        self._heads = rank_heads(spec, tp.size)
        self._eps = spec.rms_norm_eps
        self._scale = spec.head_dim**-0.5
        self._qkv, self._qkv_bias = kernels.pack(parameters.pop("qkv")), parameters.get("qkv_bias")
        self._o, self._o_bias = kernels.pack(parameters.pop("o")), _row_bias(parameters.get("o_bias"), tp)
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
        return self._tp.all_reduce(self._kernels.linear(attended.flatten(1), self._o, self._o_bias))


class MLP:
    """SwiGLU (arXiv 2002.05202): gate and up are column-parallel in one matrix, down is row-parallel."""

    def __init__(self, parameters: dict[str, torch.Tensor], kernels: KernelSet, tp: Communicator) -> None:
        self._kernels = kernels
        self._tp = tp
        self._gate_up, self._gate_up_bias = kernels.pack(parameters.pop("gate_up")), parameters.get("gate_up_bias")
        self._down, self._down_bias = kernels.pack(parameters.pop("down")), _row_bias(parameters.get("down_bias"), tp)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[T, hidden]`` to ``[T, hidden]``, summed over ranks."""
        gate_up = self._kernels.linear(hidden, self._gate_up, self._gate_up_bias)
        return self._tp.all_reduce(
            self._kernels.linear(self._kernels.silu_and_mul(gate_up), self._down, self._down_bias)
        )


class Decoder:
    """Embedding, layers and head.

    Takes the parameters named by `ridgewalk.model.sharding.shard_plan` out of the dict that it is given, so that each
    original is freed when it has been packed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parameters: dict[str, torch.Tensor],
        kernels: KernelSet,
        tp: Communicator,
        max_model_len: int,
        clock: PhaseClock,
    ) -> None:
        self._spec = spec
        self._kernels = kernels
        self._tp = tp
        self._clock = clock
        self._norm = parameters["norm"]
        self._cos_sin = rope_table(spec.rope, spec.head_dim, max_model_len, self._norm.device)
        self._embedding = kernels.pack(parameters.pop("embedding"))
        self._head = self._embedding if spec.tie_word_embeddings else kernels.pack(parameters.pop("head"))
        self._layers = [_Layer(spec, _layer(parameters, index), kernels, tp) for index in range(spec.num_layers)]

    @property
    def vocab_start(self) -> int:
        """The first token id of this rank's shard of the vocabulary."""
        return self._tp.rank * self._head.num_outputs

    def forward(self, step: StepTensors, caches: list[LayerCache]) -> torch.Tensor:
        """Logits of the sampled tokens over this rank's shard of the vocabulary: ``[num_sampled, vocab_per_rank]``.

        Writes the keys and values of every token of the step. In the padding of the last shard logits are -inf.
        """
        clock, spec = self._clock, self._spec
        residual = self._embed(step.token_ids)
        clock.mark("embed")
        hidden = self._kernels.rms_norm(residual, self._layers[0].attention_norm, spec.rms_norm_eps)
        for index, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            hidden = layer.attention.forward(hidden, step, self._cos_sin, cache)
            clock.mark("attention")
            hidden = self._kernels.add_rms_norm(hidden, residual, layer.mlp_norm, spec.rms_norm_eps)
            hidden = layer.mlp.forward(hidden)
            if index + 1 < len(self._layers):
                following = self._layers[index + 1].attention_norm
                hidden = self._kernels.add_rms_norm(hidden, residual, following, spec.rms_norm_eps)
            clock.mark("mlp")
        if step.sampled_tokens is not None:
            hidden, residual = hidden[step.sampled_tokens], residual[step.sampled_tokens]
        hidden = self._kernels.add_rms_norm(hidden, residual, self._norm, spec.rms_norm_eps)
        logits = self._kernels.linear(hidden, self._head)
        padding_from = self._spec.vocab_size - self.vocab_start
        if padding_from < logits.shape[1]:
            logits[:, max(padding_from, 0) :] = -torch.inf
        clock.mark("head")
        return logits

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._tp.size == 1:
            return self._kernels.rows(self._embedding, token_ids)
        local = token_ids - self.vocab_start
        absent = (local < 0) | (local >= self._embedding.num_outputs)
        embedded = self._kernels.rows(self._embedding, local.masked_fill(absent, 0))
        return self._tp.all_reduce(embedded.masked_fill(absent[:, None], 0))


class _Layer:
    def __init__(
        self, spec: ModelSpec, parameters: dict[str, torch.Tensor], kernels: KernelSet, tp: Communicator
    ) -> None:
        self.attention_norm = parameters["attention_norm"]
        self.mlp_norm = parameters["mlp_norm"]
        self.attention = Attention(spec, parameters, kernels, tp)
        self.mlp = MLP(parameters, kernels, tp)


def rank_heads(spec: ModelSpec, tp: int) -> HeadLayout:
    """Heads of one tensor-parallel rank."""
    return HeadLayout(spec.num_heads_per_rank(tp), spec.num_kv_heads_per_rank(tp), spec.head_dim)


def _layer(parameters: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): parameters.pop(name) for name in list(parameters) if name.startswith(prefix)}


def _row_bias(bias: torch.Tensor | None, tp: Communicator) -> torch.Tensor | None:
    """The bias of a row-parallel matrix enters the sum over ranks once."""
    return bias if tp.rank == 0 else None
