"""Expert parallelism: rows travel to the ranks that hold their experts, and the results come back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ridgewalk.kernels.expert_kernels import RowGroups, SendPlan
from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.parallel.communicator import Communicator

MOST_TURNS = 120
"""Of a table. With it, up to six copies, and eight, share equally beside any others; the table of 256 experts is
240 KiB a layer."""


@dataclass(frozen=True)
class Arrival:
    """What one dispatch brought to this rank, and what combine needs to send the results home."""

    rows: torch.Tensor  # [M, H]: in the order of their sources; rows contiguous, with a gap between them
    by_slot: RowGroups  # of these rows
    sources: torch.Tensor  # int64 CPU [ep]: how many came from each rank
    plan: SendPlan  # of what this rank sent


class Dispatcher:
    """The all-to-alls of one layer. All ranks of the group enter every dispatch and every combine, empty-handed or not.

    A row's slot travels in its last element, so that each direction is one exchange.
    """

    def __init__(
        self,
        slots: Sequence[Sequence[int]],
        num_experts: int,
        kernels: KernelSet,
        ep: Communicator,
        device: torch.device,
    ) -> None:
        """Plan the ways of a layer.

        Args:
            slots: ``slots[rank][slot]`` is the expert there; every rank has the same number of slots. An expert that is
                there more than once is taken from this rank if it is here, else tokens take turns.
            num_experts: of the layer.
            kernels: of the device.
            ep: the ranks of ``slots``.
            device: of the rows.

        Raises:
            ValueError: an expert is nowhere.
        """
        self._kernels = kernels
        self._ep = ep
        self._num_slots = len(slots[0])
        self._table = replica_table(slots, num_experts, ep.rank).to(device)
        self.routed_rows = 0  # that left this rank, since it was made
        self.routed_bytes = 0  # of them

    def dispatch(self, hidden: torch.Tensor, experts: torch.Tensor) -> Arrival:
        """Send each row of ``[T, H]`` to its experts, int64 ``[T, k]``; receive those that others sent here."""
        plan = self._kernels.plan_send(experts, self._table, self._ep.rank, self._ep.size, self._num_slots)
        tagged = self._kernels.tag_rows(hidden, plan, experts.shape[1])
        arrived, sources = self._ep.all_to_all(tagged, plan.counts, "dispatch")
        self._count(tagged, plan.counts)
        by_slot = self._kernels.group_tagged(arrived, self._num_slots)
        return Arrival(arrived[:, :-1], by_slot, sources, plan)

    def combine(self, results: torch.Tensor, arrival: Arrival, weights: torch.Tensor) -> torch.Tensor:
        """Send results ``[M, H]``, in the order of the arrival's rows, home; weigh those that come back: ``[T, H]``."""
        returned, _ = self._ep.all_to_all(results, arrival.sources, "combine")
        return self._kernels.weighted_sum(returned, weights, arrival.plan.position)

    def _count(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        left = len(rows) - int(counts[self._ep.rank])
        self.routed_rows += left
        self.routed_bytes += left * rows.shape[1] * rows.element_size()


def replica_table(slots: Sequence[Sequence[int]], num_experts: int, rank: int) -> torch.Tensor:
    """Places (rank * slots + slot) of each expert as one rank sees them: int64 ``[E, turns]``, cyclic.

    As many turns as are a multiple of every expert's number of copies, so that copies share equally. Where that is over
    `MOST_TURNS`, that many: then a copy of c may have one turn more than another, of about ``MOST_TURNS / c``.

    Raises:
        ValueError: an expert is nowhere.
    """
    places: list[list[int]] = [[] for _ in range(num_experts)]
    for holder, held in enumerate(slots):
        for slot, expert in enumerate(held):
            places[expert].append(holder * len(held) + slot)
    for expert, found in enumerate(places):
        if not found:
            raise ValueError(f"the expert map has no slot for expert {expert}")
        here = [place for place in found if place // len(slots[0]) == rank]
        places[expert] = here[:1] or found
    counts = {len(found) for found in places}
    turns = min(math.lcm(*counts), max(MOST_TURNS, *counts))
    return torch.tensor([[found[turn % len(found)] for turn in range(turns)] for found in places])
