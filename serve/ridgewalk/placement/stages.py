"""Pipeline stages: contiguous layers, balanced by the weight bytes that a step reads."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from ridgewalk.placement.parameters import (
    attention_matrices,
    dense_parameters,
    expert_parameters,
    router_parameters,
    shared_parameters,
)

if TYPE_CHECKING:
    from ridgewalk.placement.model_spec import ModelSpec

STEP_TOKENS = 64
"""Tokens of the step that stages are balanced for: it decides how many experts of a sparse layer are read."""


@lru_cache(maxsize=64)
def stage_layers(spec: ModelSpec, pp: int) -> tuple[range, ...]:
    """Layers of each of ``pp`` stages, at least one each, so that the costliest stage costs as little as can be.

    Among the divisions of that cost, the one with the least sum of squares. Costs are `layer_costs`, and the head's
    on the last stage.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if not 1 <= pp <= spec.num_layers:
        raise ValueError(f"{spec.num_layers} layers cannot be divided into {pp} stages")
    costs = layer_costs(spec)
    costs[-1] += spec.vocab_size * spec.hidden_size
    sums = [0, *accumulate(costs)]
    limit = _least_limit(sums, pp)
    bounds = _divide(sums, pp, limit)
    return tuple(range(start, end) for start, end in pairwise(bounds))


def layer_costs(spec: ModelSpec) -> list[int]:
    """Weights that a step of `STEP_TOKENS` tokens reads in each layer, in parameters.

    Of E experts, such tokens with k choices each are expected to touch E (1 - (1 - k/E)^tokens).
    """
    attention, sparse = attention_matrices(spec, 1), 0
    if spec.moe:
        moe = spec.moe
        touched = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** STEP_TOKENS)
        sparse = round(touched * expert_parameters(spec)) + shared_parameters(spec, 1) + router_parameters(spec)
    return [
        attention + (sparse if spec.is_sparse(layer) else dense_parameters(spec, 1)) for layer in range(spec.num_layers)
    ]


def _least_limit(sums: list[int], pp: int) -> int:
    """The least cost of the costliest of ``pp`` contiguous parts: bisection over greedy filling."""
    costs = [after - before for before, after in pairwise(sums)]
    low, high = max(max(costs), -(-sums[-1] // pp)), sums[-1]
    while low < high:
        middle = (low + high) // 2
        if _num_parts(costs, middle) <= pp:
            high = middle
        else:
            low = middle + 1
    return low


def _num_parts(costs: list[int], limit: int) -> int:
    parts, filled = 1, 0
    for cost in costs:
        if filled + cost > limit:
            parts, filled = parts + 1, 0
        filled += cost
    return parts


def _divide(sums: list[int], pp: int, limit: int) -> list[int]:
    """Bounds of ``pp`` parts of at least one layer and at most ``limit`` each, with the least sum of squares."""
    num_layers = len(sums) - 1
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]  # [parts][end] = least sum of squares, start of the last
    for part in range(1, pp + 1):
        ends: dict[int, tuple[int, int]] = {}
        for end in range(part, num_layers + 1):
            options = [
                (squares + (sums[end] - sums[start]) ** 2, start)
                for start, (squares, _) in best[-1].items()
                if start < end and sums[end] - sums[start] <= limit
            ]
            if options:
                ends[end] = min(options)
        best.append(ends)
    bounds = [num_layers]
    for part in range(pp, 0, -1):
        bounds.append(best[part][bounds[-1]][1])
    return bounds[::-1]
