"""The kernels of a sparse layer in torch's operations: the reference, and what GPUs run."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from ridgewalk.kernels.block_scales import Fp8Linear, Fp8Weight, Weight, block_linear
from ridgewalk.kernels.expert_kernels import ExpertWeights, RouterRules, RowGroups, SendPlan

ROW_BLOCK = 16384
"""Rows that go through the experts at once, so that a long prefill does not hold all its gates in memory."""

_TAG_TYPES = {2: torch.int16, 4: torch.int32}


class TorchExpertKernels:
    """`ExpertKernels` for any device."""

    _fp8_linear: Fp8Linear = staticmethod(block_linear)

    def route(
        self, logits: torch.Tensor, rules: RouterRules, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ExpertKernels.route`."""
        logits = logits.float()
        scores = logits.softmax(dim=-1) if rules.scoring == "softmax" else logits.sigmoid()
        chosen_by = scores if bias is None else scores + bias
        if rules.limits_groups:
            chosen_by = chosen_by.masked_fill(
                ~_allowed(chosen_by, rules), 0.0 if rules.group_score == "max" else -torch.inf
            )
        experts = _best(chosen_by, rules.top_k)
        weights = (chosen_by if bias is None and rules.group_score == "max" else scores).gather(1, experts)
        if rules.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * rules.scale, experts

    def group_rows(self, groups: torch.Tensor, num_groups: int) -> RowGroups:
        """See `ExpertKernels.group_rows`."""
        groups = groups.flatten()
        order = torch.argsort(groups, stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        bounds = torch.arange(num_groups + 1, dtype=groups.dtype, device=order.device)
        starts = torch.searchsorted(groups[order], bounds)  # `bincount` would wait for the device
        return RowGroups(order, position, starts)

    def plan_send(
        self, experts: torch.Tensor, table: torch.Tensor, turn: int, num_ranks: int, num_slots: int
    ) -> SendPlan:
        """See `ExpertKernels.plan_send`."""
        turns = (torch.arange(len(experts), device=experts.device) + turn) % table.shape[1]
        places = table[experts, turns[:, None]].flatten()
        rows = self.group_rows(places, num_ranks * num_slots)
        counts = rows.starts[::num_slots].diff().cpu()
        return SendPlan(rows.order, rows.position, places[rows.order] % num_slots, counts)

    def tag_rows(self, x: torch.Tensor, plan: SendPlan, copies: int) -> torch.Tensor:
        """See `ExpertKernels.tag_rows`."""
        tagged = x.new_empty((len(plan.order), x.shape[1] + 1))
        tagged[:, :-1] = x[plan.order // copies]
        tagged.view(_TAG_TYPES[x.element_size()])[:, -1] = plan.tags
        return tagged

    def group_tagged(self, tagged: torch.Tensor, num_slots: int) -> RowGroups:
        """See `ExpertKernels.group_tagged`."""
        slots = tagged.view(_TAG_TYPES[tagged.element_size()])[:, -1].long()
        return self.group_rows(slots, num_slots)

    def pack_experts(self, gate_up: Weight, down: Weight) -> ExpertWeights:
        """See `ExpertKernels.pack_experts`."""
        num_slots, hidden_size, intermediate_size = down.shape
        return ExpertWeights(gate_up, down, num_slots, hidden_size, intermediate_size, packed=False)

    def expert_mlp(
        self,
        x: torch.Tensor,
        starts: torch.Tensor,
        weights: ExpertWeights,
        order: torch.Tensor | None = None,
        copies: int = 1,
    ) -> torch.Tensor:
        """See `ExpertKernels.expert_mlp`."""
        count = len(x) * copies
        out = x.new_empty((count, weights.hidden_size))
        for begin in range(0, count, ROW_BLOCK):
            end = min(begin + ROW_BLOCK, count)
            within = (starts - begin).clamp(0, end - begin)
            rows = slice(begin, end) if order is None else order[begin:end]
            source = rows if order is None else rows // copies
            gate, up = self._grouped(x[source], within, weights.gate_up).chunk(2, dim=-1)
            out[rows] = self._grouped(F.silu(gate) * up, within, weights.down)
        return out

    def weighted_sum(
        self, rows: torch.Tensor, weights: torch.Tensor, position: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `ExpertKernels.weighted_sum`."""
        tokens, count = weights.shape
        chosen = (rows if position is None else rows[position]).view(tokens, count, rows.shape[1])
        total = torch.zeros((tokens, rows.shape[1]), device=rows.device)
        for choice in range(count):
            total += weights[:, choice, None] * chosen[:, choice].float()
        return total.to(rows.dtype)

    def _grouped(self, x: torch.Tensor, starts: torch.Tensor, weight: Weight) -> torch.Tensor:
        if not isinstance(weight, Fp8Weight):
            return grouped_linear(x, starts, weight)
        out = x.new_empty((len(x), weight.shape[1]))
        for slot, (begin, end) in enumerate(pairwise(starts.tolist())):
            if begin < end:
                out[begin:end] = self._fp8_linear(x[begin:end], weight.slot(slot), None)
        return out


def grouped_linear(x: torch.Tensor, starts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T`` with the matrix of each row's group.

    Args:
        x: ``[N, inputs]``, sorted by group.
        starts: int64 ``[groups + 1]``.
        weight: ``[groups, outputs, inputs]``.
    """
    if _grouped_mm_takes(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=starts[1:].int())
    parts = [F.linear(x[a:b], matrix) for (a, b), matrix in zip(pairwise(starts.tolist()), weight, strict=True)]
    return torch.cat(parts)


def _grouped_mm_takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `grouped_mm` has a kernel: rows of whole 16 bytes; on CUDA BF16 from Ampere on."""
    if any(tensor.stride(-2) * tensor.element_size() % 16 or tensor.data_ptr() % 16 for tensor in (x, weight)):
        return False
    if weight.shape[1] * weight.element_size() % 16:
        return False
    if x.is_cuda:
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu"


def _allowed(scores: torch.Tensor, rules: RouterRules) -> torch.Tensor:
    """Which experts a token may choose: bool ``[T, E]``."""
    grouped = scores.unflatten(1, (rules.num_groups, -1))
    best = grouped.topk(min(2, grouped.shape[2]) if rules.group_score == "top2" else 1, dim=-1).values.sum(dim=-1)
    groups = _best(best, rules.topk_groups)
    mask = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
    return mask[:, :, None].expand_as(grouped).flatten(1)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the greatest of each row, the first among equals: ``[T, count]``."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
