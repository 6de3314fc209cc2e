"""The operations of a sparse layer, part of `KernelSet`: routing, grouping rows by expert, the experts themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ridgewalk.kernels.block_scales import Weight


@dataclass(frozen=True)
class RouterRules:
    """How a router's logits become a token's experts and their weights."""

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1  # experts lie in groups of equal size, one after the other
    topk_groups: int = 1  # groups that a token may choose experts from
    group_score: Literal["max", "top2"] = "max"  # of a group: its best score, or the sum of its two best
    normalize: bool = False  # weights of a token are divided by their sum
    scale: float = 1.0  # factor of every weight

    @property
    def limits_groups(self) -> bool:
        """True when a token may not choose from all groups."""
        return self.topk_groups < self.num_groups


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of the experts of one rank, one a slot, laid out as the kernel set that made them wants them."""

    gate_up: Weight
    down: Weight
    num_slots: int
    hidden_size: int
    intermediate_size: int
    packed: bool  # False: `gate_up` is ``[slots, 2 * intermediate, hidden]``, `down` ``[slots, hidden, intermediate]``


@dataclass(frozen=True)
class RowGroups:
    """A stable order of ``N`` rows by group."""

    order: torch.Tensor  # int64 [N]: rows in the order of their groups
    position: torch.Tensor  # int64 [N]: where each row stands in `order`
    starts: torch.Tensor  # int64 [num_groups + 1]: where each group begins in `order`


@dataclass(frozen=True)
class SendPlan:
    """The order in which ``N`` (token, choice) pairs travel: by rank, then by slot there."""

    order: torch.Tensor  # int64 [N]: pairs, in the order in which they travel
    position: torch.Tensor  # int64 [N]: where each pair stands in `order`
    tags: torch.Tensor  # int64 [N]: slots of the pairs, in the order in which they travel
    counts: torch.Tensor  # int64 CPU [ranks]: pairs for each rank


class ExpertKernels(Protocol):
    """Kernels of a sparse layer. ``T`` tokens choose ``k`` of ``E`` experts each; ``H`` is the hidden size."""

    def route(
        self, logits: torch.Tensor, rules: RouterRules, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts. Among equal scores the lower expert wins.

        Scores are the softmax or sigmoid of the logits, in FP32. Groups, then experts, are chosen by score + bias; the
        weights are the scores themselves. Experts of groups that were not chosen count as 0 (group score "max",
        DeepSeek-V2) or as -inf ("top2", DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

        Args:
            logits: ``[T, E]``, of any dtype.
            rules: of the router.
            bias: FP32 ``[E]``, or None.

        Returns:
            Weights, FP32 ``[T, k]``, and experts, int64 ``[T, k]``, best first.
        """

    def group_rows(self, groups: torch.Tensor, num_groups: int) -> RowGroups:
        """Order N rows by the group of each: int64 of any shape, in ``[0, num_groups)``. The order is stable."""

    def plan_send(
        self, experts: torch.Tensor, table: torch.Tensor, turn: int, num_ranks: int, num_slots: int
    ) -> SendPlan:
        """Where each choice of each token goes.

        Args:
            experts: int64 ``[T, k]``.
            table: int64 ``[E, turns]``: places (rank * num_slots + slot) of each expert, which tokens take in turns.
            turn: of the first token.
            num_ranks, num_slots: ranks, and slots of each.
        """

    def tag_rows(self, x: torch.Tensor, plan: SendPlan, copies: int) -> torch.Tensor:
        """The rows that travel, each followed by its slot: ``[T, H]`` to ``[T * copies, H + 1]``.

        The slot is in the last element's bits, as an integer of its size: `group_tagged` reads it.
        """

    def group_tagged(self, tagged: torch.Tensor, num_slots: int) -> RowGroups:
        """Order rows that `tag_rows` made by their slot."""

    def pack_experts(self, gate_up: Weight, down: Weight) -> ExpertWeights:
        """Lay out ``[slots, 2 * I, H]`` (gate first) and ``[slots, H, I]``; done once, at load. Either may be FP8."""

    def expert_mlp(
        self,
        x: torch.Tensor,
        starts: torch.Tensor,
        weights: ExpertWeights,
        order: torch.Tensor | None = None,
        copies: int = 1,
    ) -> torch.Tensor:
        """SwiGLU of each row by the expert of its slot, ``[N, H]``. No result depends on the other rows.

        Without ``order``, rows are sorted by slot. With it, row ``order[i]`` of the output is that of the ith by slot,
        and its input is row ``order[i] // copies`` of ``x``: a token that goes to several experts need not be copied.

        Args:
            x: ``[N // copies, H]``; rows contiguous, with any stride between them.
            starts: int64 ``[slots + 1]``: where the rows of each slot begin.
            weights: from `pack_experts`.
            order: int64 ``[N]``, or None.
            copies: experts that a row of ``x`` goes to.
        """

    def weighted_sum(
        self, rows: torch.Tensor, weights: torch.Tensor, position: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``sum_j weights[t, j] * rows[position[t * k + j]]``, in FP32 and in the order of j: ``[T, H]``.

        Args:
            rows: ``[T * k, H]``.
            weights: FP32 ``[T, k]``.
            position: int64 ``[T * k]``; None: rows are in order.
        """
