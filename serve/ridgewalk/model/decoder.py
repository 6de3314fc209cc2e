"""The decoder's layers of one rank: a pipeline stage, tensor-parallel, its sparse layers expert-parallel if asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ridgewalk.kernels.block_scales import Weight
from ridgewalk.kernels.kernel_set import KernelSet, Matrix
from ridgewalk.model.attention import Attention
from ridgewalk.model.batch import StepTensors
from ridgewalk.model.kv_cache import LatentCache, LayerCache
from ridgewalk.model.mla import LatentAttention
from ridgewalk.model.mlp import MLP
from ridgewalk.model.moe import MoE
from ridgewalk.model.phase_clock import PhaseClock
from ridgewalk.model.rope import rope_table
from ridgewalk.model.runner_config import RunnerConfig
from ridgewalk.parallel.process_groups import ProcessGroups
from ridgewalk.placement.expert_map import ExpertMap
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.placement.stages import stage_layers


class Decoder:
    """A stage: the first one embeds, the last one has the head; between stages travel hidden states.

    Takes the parameters named by `ridgewalk.model.sharding.shard_plan` out of the dict that it is given, so that each
    original is freed when it has been packed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: RunnerConfig,
        parameters: dict[str, Weight],
        kernels: KernelSet,
        groups: ProcessGroups,
        expert_map: ExpertMap | None,
        clock: PhaseClock,
    ) -> None:
        """Pack the parameters.

        Args:
            spec: the whole model.
            config: of this rank.
            parameters: of this rank; emptied.
            kernels: of its device.
            groups: of this rank.
            expert_map: that the parameters were read by; None for a dense model.
            clock: marked after each part of a step.
        """
        self._spec = spec
        self._kernels = kernels
        self._groups = groups
        self._clock = clock
        self._device = torch.device(config.device)
        self._dtype = getattr(torch, config.dtype)
        self._cos_sin = rope_table(spec.rope, spec.head_dim, config.max_model_len, self._device)
        self._embedding = _packed(parameters, "embedding", kernels)
        self._norm = parameters.get("norm")
        self._head: Matrix | None = None
        if groups.next is None:
            self._head = self._embedding if spec.tie_word_embeddings else _packed(parameters, "head", kernels)
        _, stage, _ = config.mesh.coordinates(config.rank)
        sparse = list(spec.moe.sparse_layers) if spec.moe is not None else []
        self._layers: list[_Layer] = []
        for index in stage_layers(spec, config.mesh.pp)[stage]:
            slots = expert_map.layers[sparse.index(index)] if expert_map is not None and index in sparse else None
            self._layers.append(_Layer(spec, _layer(parameters, index), kernels, groups, slots, clock))

    @property
    def sparse_layers(self) -> list[MoE]:
        """The mixtures of experts of the stage, in order."""
        return [layer.feed_forward for layer in self._layers if isinstance(layer.feed_forward, MoE)]

    def forward(self, step: StepTensors | None, caches: Sequence[LayerCache | LatentCache]) -> torch.Tensor | None:
        """Compute the stage for the tokens of a step; None: this attention group has none.

        Writes the keys and values of every token. Collective: a group without tokens still takes part in the exchange
        of expert-parallel layers.

        Returns:
            On the last stage, when tokens are sampled, their logits over this rank's shard of the vocabulary:
            ``[num_sampled, vocab_per_rank]``, -inf in the padding of the last shard. Otherwise None.
        """
        if step is None:
            self._exchange_only()
            return None
        residual = self._input(step)
        hidden = self._kernels.rms_norm(residual, self._layers[0].attention_norm, self._spec.rms_norm_eps)
        for index, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            hidden = layer.attention.forward(hidden, step, self._cos_sin, cache)
            hidden = self._kernels.add_rms_norm(hidden, residual, layer.mlp_norm, self._spec.rms_norm_eps)
            self._clock.mark("attention")
            hidden = layer.feed_forward.forward(hidden)
            self._clock.mark(layer.phase)
            if index + 1 < len(self._layers):
                following = self._layers[index + 1].attention_norm
                hidden = self._kernels.add_rms_norm(hidden, residual, following, self._spec.rms_norm_eps)
        return self._output(hidden, residual, step)

    def _exchange_only(self) -> None:
        if self._groups.ep.size == 1:
            return
        nothing = torch.empty((0, self._spec.hidden_size), dtype=self._dtype, device=self._device)
        for layer in self.sparse_layers:
            layer.forward(nothing)
            self._clock.mark("experts")

    def _input(self, step: StepTensors) -> torch.Tensor:
        """``[T, hidden]``: the embedded tokens, or what the stage before sends."""
        if self._groups.previous is None:
            hidden = self._embed(step.token_ids)
        else:
            hidden = self._groups.previous.recv((len(step.token_ids), self._spec.hidden_size), self._dtype)
        self._clock.mark("embed")
        return hidden

    def _output(self, hidden: torch.Tensor, residual: torch.Tensor, step: StepTensors) -> torch.Tensor | None:
        logits = None
        if self._groups.next is not None:
            self._groups.next.send(residual.add_(hidden))
        elif step.num_sampled:
            logits = self._logits(hidden, residual, step.sampled_tokens)
        self._clock.mark("head")
        return logits

    def _logits(
        self, hidden: torch.Tensor, residual: torch.Tensor, sampled_tokens: torch.Tensor | None
    ) -> torch.Tensor:
        assert self._norm is not None
        assert self._head is not None
        if sampled_tokens is not None:
            hidden, residual = hidden[sampled_tokens], residual[sampled_tokens]
        hidden = self._kernels.add_rms_norm(hidden, residual, self._norm, self._spec.rms_norm_eps)
        logits = self._kernels.linear(hidden, self._head)
        padding_from = self._spec.vocab_size - self._groups.tp.rank * self._head.num_outputs
        if padding_from < logits.shape[1]:
            logits[:, max(padding_from, 0) :] = -torch.inf
        return logits

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert self._embedding is not None
        tp = self._groups.tp
        if tp.size == 1:
            return self._kernels.rows(self._embedding, token_ids)
        local = token_ids - tp.rank * self._embedding.num_outputs
        absent = (local < 0) | (local >= self._embedding.num_outputs)
        embedded = self._kernels.rows(self._embedding, local.masked_fill(absent, 0))
        return tp.all_reduce(embedded.masked_fill(absent[:, None], 0))


class _Layer:
    def __init__(
        self,
        spec: ModelSpec,
        parameters: dict[str, Weight],
        kernels: KernelSet,
        groups: ProcessGroups,
        slots: Sequence[Sequence[int]] | None,
        clock: PhaseClock,
    ) -> None:
        self.attention_norm = parameters["attention_norm"]
        self.mlp_norm = parameters["mlp_norm"]
        attention = Attention if spec.mla is None else LatentAttention
        self.attention = attention(spec, parameters, kernels, groups.tp)
        self.phase = "mlp" if slots is None else "experts"  # of what follows the last mark of the feed-forward block
        self.feed_forward = (
            MLP(parameters, kernels, groups.tp)
            if slots is None
            else MoE(spec, parameters, kernels, groups, slots, clock)
        )


def _packed(parameters: dict[str, Weight], name: str, kernels: KernelSet) -> Matrix | None:
    return kernels.pack(parameters.pop(name)) if name in parameters else None


def _layer(parameters: dict[str, Weight], index: int) -> dict[str, Weight]:
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): parameters.pop(name) for name in list(parameters) if name.startswith(prefix)}
