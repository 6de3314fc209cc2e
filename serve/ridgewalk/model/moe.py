"""A sparse layer: routed experts, split over ranks by expert or by inner size, and shared experts beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ridgewalk.kernels.block_scales import Weight
from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.model.dispatch import Dispatcher, replica_table
from ridgewalk.model.phase_clock import PhaseClock
from ridgewalk.model.router import Router
from ridgewalk.parallel.process_groups import ProcessGroups
from ridgewalk.placement.model_spec import ModelSpec


class MoE:
    """Mixture of experts in place of an MLP.

    With expert parallelism each tensor-parallel rank routes its own share of the tokens and the experts' results come
    back to it; without, every rank holds a part of every expert. Either way one all-reduce over tp ends the layer.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parameters: dict[str, Weight],
        kernels: KernelSet,
        groups: ProcessGroups,
        slots: Sequence[Sequence[int]],
        clock: PhaseClock,
    ) -> None:
        """Take a layer's parameters out of the dict.

        Args:
            spec: of a sparse model.
            parameters: of this layer and rank, by the names of `ridgewalk.model.sharding.shard_plan`.
            kernels: of the device.
            groups: of this rank.
            slots: ``slots[ep_rank][slot]`` is the expert there; without expert parallelism one rank with all experts.
            clock: told when the phases "router", "experts" and "mlp" (the shared experts) end.
        """
        assert spec.moe is not None
        self._kernels = kernels
        self._tp = groups.tp
        self._clock = clock
        expert_parallel = len(slots) > 1
        self._splits_tokens = expert_parallel and groups.tp.size > 1
        router = parameters["router"]
        self._router = Router(spec.moe, parameters, kernels, router.dtype)
        self._dispatcher: Dispatcher | None = None
        self._slot_of: torch.Tensor | None = None  # of each expert, where slots are not in the experts' order
        if expert_parallel:
            self._dispatcher = Dispatcher(slots, spec.moe.num_experts, kernels, groups.ep, router.device)
        elif list(slots[0]) != list(range(spec.moe.num_experts)):
            self._slot_of = replica_table(slots, spec.moe.num_experts, 0)[:, 0].to(router.device)
        self._num_slots = len(slots[0])
        self._weights = kernels.pack_experts(parameters.pop("experts_gate_up"), parameters.pop("experts_down"))
        self._shared = _SharedExperts(parameters, kernels) if spec.moe.shared_intermediate_size else None
        self._starts = torch.zeros(self._num_slots + 1, dtype=torch.int64)

    @property
    def expert_tokens(self) -> list[int]:
        """Rows that this rank computed in the last forward, by slot."""
        return self._starts.diff().tolist()

    @property
    def routed_tokens(self) -> int:
        """Rows that left this rank for another's experts, over all forwards."""
        return self._dispatcher.routed_rows if self._dispatcher else 0

    @property
    def routed_bytes(self) -> int:
        """Bytes of these rows, on the way out."""
        return self._dispatcher.routed_bytes if self._dispatcher else 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``, summed over tp, whose ranks agree on T; with expert parallelism it may be 0."""
        own, first, last = hidden, 0, len(hidden)
        if self._splits_tokens:
            first, last = last * self._tp.rank // self._tp.size, last * (self._tp.rank + 1) // self._tp.size
            own = hidden[first:last]
        weights, experts = self._router.route(own)
        self._clock.mark("router")
        routed = self._remote(own, weights, experts) if self._dispatcher else self._local(own, weights, experts)
        self._clock.mark("experts")
        out = self._merge(hidden, routed, first, last)
        if len(hidden):
            self._tp.all_reduce(out)
        self._clock.mark("mlp")
        return out

    def _local(self, hidden: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        places = experts if self._slot_of is None else self._slot_of[experts]
        rows = self._kernels.group_rows(places, self._num_slots)
        self._starts = rows.starts
        results = self._kernels.expert_mlp(hidden, rows.starts, self._weights, rows.order, experts.shape[1])
        return self._kernels.weighted_sum(results, weights)

    def _remote(self, hidden: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        assert self._dispatcher is not None
        arrival = self._dispatcher.dispatch(hidden, experts)
        self._starts = arrival.by_slot.starts
        results = self._kernels.expert_mlp(arrival.rows, self._starts, self._weights, arrival.by_slot.order)
        return self._dispatcher.combine(results, arrival, weights)

    def _merge(self, hidden: torch.Tensor, routed: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """This rank's part of the sum over tp."""
        if self._shared is not None:
            out = self._shared.forward(hidden)
            out[first:last] += routed
            return out
        if len(routed) == len(hidden):
            return routed
        out = torch.zeros_like(hidden)
        out[first:last] = routed
        return out


class _SharedExperts:
    """All shared experts as one SwiGLU, split over tp; not summed."""

    def __init__(self, parameters: dict[str, Weight], kernels: KernelSet) -> None:
        self._kernels = kernels
        self._gate_up = kernels.pack(parameters.pop("shared_gate_up"))
        self._down = kernels.pack(parameters.pop("shared_down"))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate_up = self._kernels.linear(hidden, self._gate_up)
        return self._kernels.linear(self._kernels.silu_and_mul(gate_up), self._down)
