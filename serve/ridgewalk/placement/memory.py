"""The memory of a rank. Planner and engine call `plan_memory`, so that a feasible plan is one the engine can load."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ridgewalk.placement.activations import StepLimits, activation_bytes
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec

GIB = 1024**3


class MemoryPlanError(ValueError):
    """The model does not fit; the message names the figures and what to change."""


@dataclass(frozen=True)
class BudgetSource:
    """Where the budget of a rank comes from, in words of the errors about it."""

    gives: str  # "... 2.00 GiB"
    remedy: str


STATED = BudgetSource("--memory gives", "raise --memory, -tp or -pp")


@dataclass(frozen=True)
class StageMemory:
    """What one rank of a stage needs. Bytes."""

    weight_bytes: int
    activation_bytes: int  # the largest step: hidden states, MLP or experts, logits and tables
    kv_bytes_per_block: int

    def used_bytes(self, num_blocks: int) -> int:
        """All of it, with so many KV blocks."""
        return self.weight_bytes + self.activation_bytes + num_blocks * self.kv_bytes_per_block

    def blocks_within(self, budget_bytes: int) -> int:
        """KV blocks that fit beside the rest, negative when the rest does not fit itself."""
        return (budget_bytes - self.used_bytes(0)) // self.kv_bytes_per_block


@dataclass(frozen=True)
class MemoryPlan:
    """How the ranks spend their memory. The figures are those of the tightest rank: the one that uses most.

    Every rank has the same number of blocks, so that the scheduler sees one size.
    """

    budget_bytes: int
    stages: tuple[StageMemory, ...]
    num_blocks: int  # of each attention group
    block_size: int  # tokens
    keeps_fp8: bool = False  # weights of an FP8 checkpoint are counted as kept in FP8
    num_swap_blocks: int = 0  # of each attention group, on the host

    def with_swap_space(self, num_bytes: int) -> MemoryPlan:
        """With the blocks that ``num_bytes`` of the host's memory hold for each rank."""
        return replace(self, num_swap_blocks=num_bytes // self.largest_kv_bytes_per_block)

    @property
    def largest_kv_bytes_per_block(self) -> int:
        """A KV block on the stage where it takes most."""
        return max(stage.kv_bytes_per_block for stage in self.stages)

    @property
    def tightest(self) -> StageMemory:
        """The stage whose ranks use most."""
        return max(self.stages, key=lambda stage: stage.used_bytes(self.num_blocks))

    @property
    def weight_bytes(self) -> int:
        """Weights of the tightest rank."""
        return self.tightest.weight_bytes

    @property
    def activation_bytes(self) -> int:
        """The largest step of the tightest rank."""
        return self.tightest.activation_bytes

    @property
    def kv_bytes_per_block(self) -> int:
        """A KV block of the tightest rank."""
        return self.tightest.kv_bytes_per_block

    @property
    def kv_bytes(self) -> int:
        """The whole KV cache of the tightest rank."""
        return self.num_blocks * self.kv_bytes_per_block

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache of one attention group holds."""
        return self.num_blocks * self.block_size

    def describe_room(self) -> str:
        """Tokens of KV of an attention group, in words."""
        swap = self.num_swap_blocks * self.block_size
        return f"{self.kv_tokens:,} tokens" + (f" and swap space for {swap:,}" if swap else "")

    def blocks_within(self, budget_bytes: int) -> int:
        """KV blocks for which every rank has room in ``budget_bytes``; 0 when not even one fits."""
        return max(0, min(stage.blocks_within(budget_bytes) for stage in self.stages))


def plan_memory(
    spec: ModelSpec,
    mesh: Mesh,
    dtype: str,
    budget_bytes: int,
    block_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    num_redundant_experts: int = 0,
    source: BudgetSource = STATED,
    keeps_fp8: bool = False,
) -> MemoryPlan:
    """Compute how many KV blocks fit beside weights and activations in ``budget_bytes`` of each rank.

    The stage with least room decides. There are never more blocks than ``max_num_seqs`` sequences of
    ``max_model_len`` tokens could fill. Limits are those of one attention group. ``source``: of the budget.
    ``keeps_fp8``: the ranks' devices multiply FP8.

    Raises:
        MemoryPlanError: weights and activations do not fit, or not even one sequence of ``max_model_len`` does.
    """
    limits = StepLimits(max_num_batched_tokens, max_num_seqs, max_model_len)
    weights = spec.weight_bytes_per_stage(mesh, dtype, num_redundant_experts, keeps_fp8)
    activations = activation_bytes(spec, mesh, dtype, limits, num_redundant_experts, keeps_fp8)
    per_token = spec.kv_bytes_per_token_per_stage(mesh, dtype)
    stages = tuple(
        StageMemory(held, active, block_size * kv)
        for held, active, kv in zip(weights, activations, per_token, strict=True)
    )
    tightest = min(stages, key=lambda stage: stage.blocks_within(budget_bytes))
    fitting, per_block = tightest.blocks_within(budget_bytes), tightest.kv_bytes_per_block
    per_sequence = math.ceil(max_model_len / block_size)
    if fitting >= per_sequence:
        return MemoryPlan(budget_bytes, stages, min(fitting, per_sequence * max_num_seqs), block_size, keeps_fp8)
    smaller = ""
    if tightest.used_bytes(per_sequence) - tightest.activation_bytes // 2 <= budget_bytes:
        smaller = (  # half a step would do
            f"lower --max-num-seqs or --max-num-batched-tokens (a step of {max_num_seqs:,} sequences and "
            f"{max_num_batched_tokens:,} tokens takes {_gib(tightest.activation_bytes)}), "
        )
    if fitting < 0:
        raise MemoryPlanError(
            f"{spec.architecture} needs {_gib(tightest.weight_bytes)} of weights and "
            f"{_gib(tightest.activation_bytes)} of activations per rank at {mesh.name}, "
            f"but {source.gives} {_gib(budget_bytes)}; {smaller}{source.remedy}"
        )
    left = _gib(fitting * per_block)
    shorter = f"lower --max-model-len to {fitting * block_size} or " if fitting > 0 else ""
    raise MemoryPlanError(
        f"one sequence of {max_model_len} tokens needs {_gib(per_sequence * per_block)} of KV cache per rank at "
        f"{mesh.name}, but {source.gives} {_gib(budget_bytes)}, of which {left} is left beside weights and "
        f"activations; {shorter}{smaller}{source.remedy}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 100 else f"{num_bytes / 2**20:.2f} MiB"
