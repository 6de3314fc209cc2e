"""The C++ kernels of a sparse layer, part of `CpuKernels`."""

from __future__ import annotations

import ctypes

import torch

from ridgewalk.kernels.block_scales import Fp8Weight, Weight
from ridgewalk.kernels.cpu_calls import DTYPE_CODES, FLOAT, INT, INT64, POINTER, address, declare
from ridgewalk.kernels.expert_kernels import ExpertWeights, RouterRules, RowGroups, SendPlan
from ridgewalk.kernels.torch_experts import TorchExpertKernels


class CpuExpertKernels(TorchExpertKernels):
    """`ExpertKernels` for CPU tensors. All must be contiguous, but for the rows that `expert_mlp` takes."""

    def __init__(self, library: ctypes.CDLL, pool: int) -> None:
        self._pool = pool
        sizes = [INT64] * 3 + [INT, POINTER]  # slots, hidden, intermediate, dtype, pool
        self._expert_sizes = declare(library.rw_expert_sizes, [POINTER] * 2 + [INT64] * 2 + [INT])
        self._pack_experts = declare(library.rw_pack_experts, [POINTER] * 4 + sizes)
        self._expert_mlp = declare(
            library.rw_expert_mlp, [POINTER] * 2 + [INT64] + [POINTER] * 2 + [INT64] + [POINTER] * 2 + [INT64] + sizes
        )
        self._route = declare(library.rw_route, [POINTER] * 4 + [INT64] + [INT] * 7 + [FLOAT, INT, POINTER])
        self._group_rows = declare(library.rw_group_rows, [POINTER] * 4 + [INT64] * 2)
        self._plan_send = declare(library.rw_plan_send, [POINTER] * 6 + [INT64] * 6)
        self._tag_rows = declare(library.rw_tag_rows, [POINTER] * 4 + [INT64] * 3 + [INT, POINTER])
        self._group_tagged = declare(library.rw_group_tagged, [POINTER] * 4 + [INT64] * 3 + [INT])
        self._weighted_sum = declare(library.rw_weighted_sum, [POINTER] * 4 + [INT64, INT, INT64, INT, POINTER])

    def route(
        self, logits: torch.Tensor, rules: RouterRules, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ExpertKernels.route`."""
        rows, num_experts = logits.shape
        weights = torch.empty((rows, rules.top_k), dtype=torch.float32)
        experts = torch.empty((rows, rules.top_k), dtype=torch.int64)
        self._route(
            weights.data_ptr(),
            experts.data_ptr(),
            logits.data_ptr(),
            address(bias),
            rows,
            num_experts,
            rules.top_k,
            rules.num_groups,
            rules.topk_groups,
            rules.scoring == "sigmoid",
            rules.group_score == "top2",
            rules.normalize,
            rules.scale,
            DTYPE_CODES[logits.dtype],
            self._pool,
        )
        return weights, experts

    def group_rows(self, groups: torch.Tensor, num_groups: int) -> RowGroups:
        """See `ExpertKernels.group_rows`."""
        rows = groups.numel()
        found = torch.empty(2 * rows + num_groups + 1, dtype=torch.int64)
        at = found.data_ptr()
        self._group_rows(at, at + 8 * rows, at + 16 * rows, groups.data_ptr(), rows, num_groups)
        return RowGroups(*found.split_with_sizes((rows, rows, num_groups + 1)))

    def plan_send(
        self, experts: torch.Tensor, table: torch.Tensor, turn: int, num_ranks: int, num_slots: int
    ) -> SendPlan:
        """See `ExpertKernels.plan_send`."""
        tokens, top_k = experts.shape
        rows = tokens * top_k
        plan = torch.empty(3 * rows + num_ranks, dtype=torch.int64)
        at = plan.data_ptr()
        self._plan_send(
            at,
            at + 8 * rows,
            at + 16 * rows,
            at + 24 * rows,
            experts.data_ptr(),
            table.data_ptr(),
            tokens,
            top_k,
            table.shape[1],
            turn,
            num_ranks,
            num_slots,
        )
        return SendPlan(*plan.split_with_sizes((rows, rows, rows, num_ranks)))

    def tag_rows(self, x: torch.Tensor, plan: SendPlan, copies: int) -> torch.Tensor:
        """See `ExpertKernels.tag_rows`."""
        tokens, width = x.shape
        tagged = x.new_empty((tokens * copies, width + 1))
        self._tag_rows(
            tagged.data_ptr(),
            x.data_ptr(),
            plan.order.data_ptr(),
            plan.tags.data_ptr(),
            tokens * copies,
            copies,
            width,
            DTYPE_CODES[x.dtype],
            self._pool,
        )
        return tagged

    def group_tagged(self, tagged: torch.Tensor, num_slots: int) -> RowGroups:
        """See `ExpertKernels.group_tagged`."""
        rows, width = tagged.shape
        found = torch.empty(2 * rows + num_slots + 1, dtype=torch.int64)
        at = found.data_ptr()
        self._group_tagged(
            at, at + 8 * rows, at + 16 * rows, tagged.data_ptr(), rows, width, num_slots, DTYPE_CODES[tagged.dtype]
        )
        return RowGroups(*found.split_with_sizes((rows, rows, num_slots + 1)))

    def pack_experts(self, gate_up: Weight, down: Weight) -> ExpertWeights:
        """See `ExpertKernels.pack_experts`."""
        if isinstance(gate_up, Fp8Weight) or isinstance(down, Fp8Weight):
            return super().pack_experts(gate_up, down)
        num_slots, hidden_size, intermediate_size = down.shape
        sizes = (ctypes.c_int64(), ctypes.c_int64())
        code = DTYPE_CODES[down.dtype]
        self._expert_sizes(*map(ctypes.addressof, sizes), hidden_size, intermediate_size, code)
        if sizes[0].value == 0:
            return super().pack_experts(gate_up, down)
        packed = [down.new_empty((num_slots, size.value)) for size in sizes]
        self._pack_experts(
            packed[0].data_ptr(),
            packed[1].data_ptr(),
            gate_up.data_ptr(),
            down.data_ptr(),
            num_slots,
            hidden_size,
            intermediate_size,
            code,
            self._pool,
        )
        return ExpertWeights(*packed, num_slots, hidden_size, intermediate_size, packed=True)

    def expert_mlp(
        self,
        x: torch.Tensor,
        starts: torch.Tensor,
        weights: ExpertWeights,
        order: torch.Tensor | None = None,
        copies: int = 1,
    ) -> torch.Tensor:
        """See `ExpertKernels.expert_mlp`."""
        if not weights.packed:
            return super().expert_mlp(x, starts, weights, order, copies)
        rows = x.shape[0] * copies
        out = x.new_empty((rows, weights.hidden_size))
        self._expert_mlp(
            out.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            starts.data_ptr(),
            address(order),
            copies,
            weights.gate_up.data_ptr(),
            weights.down.data_ptr(),
            rows,
            weights.num_slots,
            weights.hidden_size,
            weights.intermediate_size,
            DTYPE_CODES[x.dtype],
            self._pool,
        )
        return out

    def weighted_sum(
        self, rows: torch.Tensor, weights: torch.Tensor, position: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `ExpertKernels.weighted_sum`."""
        tokens, count = weights.shape
        out = rows.new_empty((tokens, rows.shape[1]))
        self._weighted_sum(
            out.data_ptr(),
            rows.data_ptr(),
            weights.data_ptr(),
            address(position),
            tokens,
            count,
            rows.shape[1],
            DTYPE_CODES[rows.dtype],
            self._pool,
        )
        return out
