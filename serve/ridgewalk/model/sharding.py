"""Which slice of which checkpoint tensor lands where in which parameter of a rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ridgewalk.model.tensor_rules import (
    EMBEDDING,
    HEAD,
    NORM,
    Precision,
    Shard,
    TensorRule,
    layer_rules,
    tensor_sizes,
)
from ridgewalk.placement.expert_map import ExpertMap, uniform_expert_map
from ridgewalk.placement.fp8_weights import Share, keeps_blocks, kept_block
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.placement.stages import stage_layers


@dataclass(frozen=True)
class TensorSlice:
    """A run of a checkpoint tensor and where it lands in a parameter."""

    tensor: str
    shape: tuple[int, ...]  # of the whole tensor
    dim: int  # the axis that is sliced, in the tensor and in the parameter (in its slot)
    start: int
    stop: int
    offset: int  # index along `dim` of the parameter where the run begins
    slot: int | None = None  # index along the leading axis of a parameter of experts


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model on one rank. What no slice covers is zero (the padding of the vocabulary)."""

    shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]
    precision: Precision = Precision.COMPUTE
    fp8_block: tuple[int, int] | None = None  # rows, columns of the blocks that it is kept in; None: it is not FP8


def shard_plan(
    spec: ModelSpec, mesh: Mesh, rank: int, expert_map: ExpertMap | None = None, keeps_fp8: bool = False
) -> dict[str, Parameter]:
    """Parameters of one rank by name: ``embedding``, ``layers.N.qkv`` ... (N counts the layers of the whole model).

    Args:
        spec: the model; it fits the mesh (`ridgewalk.placement.model_spec.validate_mesh`).
        mesh: of the replica.
        rank: flat rank in the mesh.
        expert_map: which experts each expert-parallel rank holds; None is the uniform map.
        keeps_fp8: what consists of whole FP8 blocks stays in FP8, as placement counts it.
    """
    dp_rank, stage, tp_rank = mesh.coordinates(rank)
    layers = stage_layers(spec, mesh.pp)[stage]
    first, last = stage == 0, stage == mesh.pp - 1
    outer = [EMBEDDING] if first or (last and spec.tie_word_embeddings) else []
    if last:
        outer += [NORM] if spec.tie_word_embeddings else [NORM, HEAD]
    part = _TensorParallelPart(spec, mesh, tp_rank, kept_block(spec, keeps_fp8))
    plan = part.parameters(outer)
    experts = _experts_of_rank(spec, mesh, dp_rank * mesh.tp + tp_rank, expert_map)
    for layer in layers:
        tensors = part.parameters(layer_rules(spec, layer), f"model.layers.{layer}.", experts.get(layer, ()))
        plan |= {f"layers.{layer}.{name}": parameter for name, parameter in tensors.items()}
    return plan


class _TensorParallelPart:
    """The part of every tensor that falls to one tensor-parallel rank."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, tp_rank: int, fp8_block: tuple[int, int] | None) -> None:
        self._spec, self._mesh, self._tp_rank, self._fp8_block = spec, mesh, tp_rank, fp8_block
        self._sizes = tensor_sizes(spec)

    def parameters(
        self, rules: Iterable[TensorRule], prefix: str = "", slots: Sequence[int] = ()
    ) -> dict[str, Parameter]:
        """Parameters by name; ``slots`` are the routed experts held, ``prefix`` precedes the names of tensors."""
        grouped = groupby(rules, key=lambda rule: rule.parameter)
        return {name: self._parameter(list(stacked), prefix, slots) for name, stacked in grouped}

    def _parameter(self, stacked: list[TensorRule], prefix: str, slots: Sequence[int]) -> Parameter:
        rule, slices, offset, shares = stacked[0], [], 0, []
        for rule in stacked:
            shape = tuple(self._sizes[name] for name in rule.shape)
            dim = 1 if rule.shard is Shard.ROW else 0
            start, stop, length = self._part(rule, shape[dim])
            shares.append(Share(length, shape[dim]))
            places: Iterable[tuple[int | None, int]] = enumerate(slots) if rule.per_expert else [(None, 0)]
            for slot, expert in places:
                tensor = prefix + rule.tensor.format(expert=expert)
                slices.append(TensorSlice(tensor, shape, dim, start, stop, offset, slot))
            offset += length
        whole = (*shape[:dim], offset, *shape[dim + 1 :])
        block = self._fp8_block
        if block and not (rule.may_stay_fp8 and keeps_blocks(shares, block[dim])):
            block = None
        return Parameter((len(slots), *whole) if rule.per_expert else whole, tuple(slices), rule.precision, block)

    def _part(self, rule: TensorRule, size: int) -> tuple[int, int, int]:
        """``(start, stop, length)`` of the rank's part of an axis; length exceeds ``stop - start`` if it is padded."""
        spec, tp, rank, shard = self._spec, self._mesh.tp, self._tp_rank, rule.shard
        if shard is Shard.REPLICATED or (rule.per_expert and self._mesh.expert_parallel):
            return 0, size, size
        if shard is Shard.VOCAB:
            length = spec.vocab_size_per_rank(tp)
            return min(rank * length, size), min((rank + 1) * length, size), length
        if shard is Shard.KV_HEADS and tp > spec.num_kv_heads:
            head = rank * spec.num_kv_heads // tp  # ranks whose queries use this head hold the same copy
            return head * spec.head_dim, (head + 1) * spec.head_dim, spec.head_dim
        length = size // tp
        return rank * length, (rank + 1) * length, length


def _experts_of_rank(
    spec: ModelSpec, mesh: Mesh, ep_rank: int, expert_map: ExpertMap | None
) -> dict[int, Sequence[int]]:
    """Routed experts that a rank holds of each sparse layer, in the order of its slots."""
    if spec.moe is None:
        return {}
    if not mesh.expert_parallel:
        return dict.fromkeys(spec.moe.sparse_layers, range(spec.moe.num_experts))
    if expert_map is None:
        expert_map = uniform_expert_map(spec.moe, mesh.dp * mesh.tp)
    return {layer: ranks[ep_rank] for layer, ranks in zip(spec.moe.sparse_layers, expert_map.layers, strict=True)}
