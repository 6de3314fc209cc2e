"""Which rank holds which experts: contiguous by default, or balanced by observed load with hot experts replicated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ridgewalk.placement.moe_spec import MoESpec

LayerMap = tuple[tuple[int, ...], ...]
"""``[ep_rank][slot]`` = logical expert, in one sparse layer."""


@dataclass(frozen=True)
class ExpertMap:
    """``layers[i][ep_rank][slot]`` = logical expert; i counts the sparse layers of the whole model in order.

    Every rank has the same number of slots in every layer.
    """

    layers: tuple[LayerMap, ...]

    @classmethod
    def from_lists(cls, layers: Sequence[Sequence[Sequence[int]]]) -> ExpertMap:
        """From nested lists, as messages carry a map."""
        return cls(tuple(tuple(tuple(slots) for slots in layer) for layer in layers))

    @property
    def num_slots(self) -> int:
        """Experts that one rank holds in one layer, copies included."""
        return len(self.layers[0][0])

    def replicas(self, layer: int, expert: int) -> tuple[tuple[int, int], ...]:
        """``(ep_rank, slot)`` of every copy of an expert in the layer-th sparse layer, in rank order."""
        ranks = enumerate(self.layers[layer])
        return tuple((rank, slot) for rank, slots in ranks for slot, held in enumerate(slots) if held == expert)


def uniform_expert_map(moe: MoESpec, ep: int) -> ExpertMap:
    """Experts in order: rank r holds the r-th of ``ep`` equal parts, in every layer."""
    slots = moe.slots_per_rank(ep)
    layer = tuple(tuple(range(rank * slots, (rank + 1) * slots)) for rank in range(ep))
    return ExpertMap((layer,) * len(moe.sparse_layers))


def balanced_expert_map(moe: MoESpec, ep: int, num_redundant: int, loads: Sequence[Sequence[int]]) -> ExpertMap:
    """Replicate the hottest experts into ``num_redundant`` more slots, then spread the copies over the ranks by load.

    The greedy scheme of DeepSeek's EPLB (github.com/deepseek-ai/EPLB). Copies of an expert are on different ranks,
    and share its load equally. Where that balances worse than `uniform_expert_map`, which happens when the loads are
    all but equal, a layer keeps the uniform map and each rank copies experts of its own.

    Args:
        moe: the layers.
        ep: expert-parallel ranks; divides ``num_experts + num_redundant``, and ``num_experts`` too.
        num_redundant: copies beyond one of each, at most ``num_experts * (ep - 1)``.
        loads: tokens seen by each expert, ``[sparse layer][expert]``.
    """
    slots = moe.slots_per_rank(ep, num_redundant)
    uniform = uniform_expert_map(moe, ep).layers[0]
    return ExpertMap(tuple(_balance(uniform, slots, load) for load in loads))


def imbalance(expert_map: ExpertMap, loads: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Load of the heaviest rank over the mean rank's, by sparse layer; 1.0 where nothing was seen."""
    return tuple(
        _heaviest(layer, load) * len(layer) / sum(load) if sum(load) else 1.0
        for layer, load in zip(expert_map.layers, loads, strict=True)
    )


def _balance(uniform: LayerMap, slots: int, load: Sequence[int]) -> LayerMap:
    ep = len(uniform)
    copies = _replicate(load, slots * ep, ep)
    balanced = _pack(copies, load, ep, slots) or _deal(copies, load, ep)
    if _heaviest(balanced, load) <= _heaviest(uniform, load):
        return balanced
    return tuple((*experts, *(experts * slots)[: slots - len(experts)]) for experts in uniform)


def _replicate(load: Sequence[int], num_copies: int, most: int) -> list[int]:
    """Copies of each expert: each next one goes to the expert with the highest load a copy, ``most`` at most."""
    copies = [1] * len(load)
    for _ in range(num_copies - len(load)):
        candidates = [expert for expert in range(len(load)) if copies[expert] < most]
        hottest = max(candidates, key=lambda expert: load[expert] / copies[expert])
        copies[hottest] += 1
    return copies


def _pack(copies: Sequence[int], load: Sequence[int], ep: int, slots: int) -> LayerMap | None:
    """Heaviest copies first, each on the least loaded rank that has a slot and no copy of the expert; None: stuck.

    Replicated experts go before the others, which then fit anywhere.
    """
    held: list[list[int]] = [[] for _ in range(ep)]
    carried = [0.0] * ep
    order = sorted(range(len(load)), key=lambda expert: (copies[expert] == 1, -load[expert] / copies[expert]))
    for expert in order:
        free = sorted((rank for rank in range(ep) if len(held[rank]) < slots), key=lambda r: (carried[r], len(held[r])))
        if len(free) < copies[expert]:
            return None
        for rank in free[: copies[expert]]:
            held[rank].append(expert)
            carried[rank] += load[expert] / copies[expert]
    return tuple(tuple(sorted(experts)) for experts in held)


def _deal(copies: Sequence[int], load: Sequence[int], ep: int) -> LayerMap:
    """Copies dealt round: as an expert has at most ``ep``, they come on different ranks."""
    order = sorted(range(len(load)), key=lambda expert: -load[expert] / copies[expert])
    sequence = [expert for expert in order for _ in range(copies[expert])]
    return tuple(tuple(sorted(sequence[rank::ep])) for rank in range(ep))


def _heaviest(layer: LayerMap, load: Sequence[int]) -> float:
    """Load of the heaviest rank, when the copies of an expert share its load equally."""
    copies = [0] * len(load)
    for expert in (expert for experts in layer for expert in experts):
        copies[expert] += 1
    return max(sum(load[expert] / copies[expert] for expert in experts) for experts in layer)
