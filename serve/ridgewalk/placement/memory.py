"""The memory of a rank. Planner and engine call `plan_memory`, so that a feasible plan is one the engine can load."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import DTYPE_BYTES, ModelSpec

GIB = 1024**3


class MemoryPlanError(ValueError):
    """The model does not fit; the message names the figures and what to change."""


@dataclass(frozen=True)
class MemoryPlan:
    """How one rank spends its memory. All sizes in bytes, of one rank."""

    budget_bytes: int
    weight_bytes: int
    activation_bytes: int  # the largest step: hidden states, MLP, logits and tables
    kv_bytes_per_block: int
    num_blocks: int
    block_size: int  # tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole KV cache."""
        return self.num_blocks * self.kv_bytes_per_block

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


def plan_memory(
    spec: ModelSpec,
    mesh: Mesh,
    dtype: str,
    budget_bytes: int,
    block_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
) -> MemoryPlan:
    """Compute how many KV blocks fit beside weights and activations in ``budget_bytes`` of one rank.

    There are never more blocks than ``max_num_seqs`` sequences of ``max_model_len`` tokens could fill.

    Raises:
        MemoryPlanError: weights and activations do not fit, or not even one sequence of ``max_model_len`` does.
    """
    weights = spec.weight_bytes_per_rank(mesh, dtype)
    activations = activation_bytes(spec, mesh, dtype, max_num_batched_tokens, max_num_seqs, max_model_len)
    per_block = block_size * spec.kv_bytes_per_token(mesh, dtype)
    if weights + activations > budget_bytes:
        raise MemoryPlanError(
            f"{spec.architecture} needs {_gib(weights)} of weights and {_gib(activations)} of activations per rank at "
            f"{mesh.name}, but --memory gives {_gib(budget_bytes)}; raise --memory or -tp"
        )
    per_sequence = math.ceil(max_model_len / block_size)
    fitting = (budget_bytes - weights - activations) // per_block
    if fitting < per_sequence:
        shorter = f"lower --max-model-len to {fitting * block_size} or " if fitting > 0 else ""
        raise MemoryPlanError(
            f"one sequence of {max_model_len} tokens needs {_gib(per_sequence * per_block)} of KV cache per rank at "
            f"{mesh.name}, but only {_gib(fitting * per_block)} of {_gib(budget_bytes)} is left beside the weights; "
            f"{shorter}raise --memory"
        )
    num_blocks = min(fitting, per_sequence * max_num_seqs)
    return MemoryPlan(budget_bytes, weights, activations, per_block, num_blocks, block_size)


def activation_bytes(
    spec: ModelSpec, mesh: Mesh, dtype: str, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
) -> int:
    """Upper bound of the memory of one step beside weights and KV cache, in bytes of one rank.

    Per token: residual, normed and projected hidden states (4 x hidden), q, k, v and the attention output, gate, up
    and their product. Per sequence: logits of the whole vocabulary in the compute dtype and three times in FP32
    (sampling). Tables: cos and sin in FP32.
    """
    size = DTYPE_BYTES[dtype]
    q_size = spec.num_heads_per_rank(mesh.tp) * spec.head_dim
    kv_size = spec.num_kv_heads_per_rank(mesh.tp) * spec.head_dim
    per_token = (4 * spec.hidden_size + 2 * q_size + 2 * kv_size + 3 * spec.intermediate_size // mesh.tp) * size
    per_sequence = spec.vocab_size * (2 * size + 3 * 4)
    tables = max_model_len * spec.head_dim * 4
    return max_num_batched_tokens * per_token + max_num_seqs * per_sequence + tables


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 100 else f"{num_bytes / 2**20:.2f} MiB"
