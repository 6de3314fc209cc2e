"""Which matrices a rank keeps in FP8: the decision that the budget is computed with and the loader acts upon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from ridgewalk.placement.mesh import Mesh

if TYPE_CHECKING:
    from ridgewalk.placement.model_spec import ModelSpec

FP8_BYTES = 1


@dataclass(frozen=True)
class Share:
    """How much of an axis of a tensor a rank holds; ranks hold equal shares, one after the other."""

    held: int
    whole: int


@dataclass(frozen=True)
class StackedMatrices:
    """Matrices that lie in one parameter of a rank, one below the other."""

    shares: tuple[Share, ...]  # of the axis that is divided over ranks
    axis: int  # 0: outputs are divided, 1: inputs are; several matrices are stacked along 0
    across: int  # length of the other axis
    copies: int = 1  # of all of it: slots of routed experts

    @property
    def num_parameters(self) -> int:
        """Weights that the rank holds."""
        return sum(share.held for share in self.shares) * self.across * self.copies

    def keeps(self, block: tuple[int, int]) -> bool:
        """Whether they consist of whole blocks on every rank."""
        return keeps_blocks(self.shares, block[self.axis])

    def num_scales(self, block: tuple[int, int]) -> int:
        """Scales of these weights."""
        divided = ceil(sum(share.held for share in self.shares) / block[self.axis])
        return divided * ceil(self.across / block[1 - self.axis]) * self.copies


def keeps_blocks(shares: Sequence[Share], size: int) -> bool:
    """Whether shares of stacked tensors consist of whole blocks of ``size``, on every rank.

    Each begins and ends at a block's border; only the last of the stack may end with its tensor within a block, as the
    next would begin there.
    """
    *others, last = shares
    return all(share.held % size == 0 for share in others) and (last.held % size == 0 or last.held == last.whole)


def kept_block(spec: ModelSpec, keeps_fp8: bool) -> tuple[int, int] | None:
    """Rows and columns of the blocks that ranks keep in FP8; None: they keep none.

    None also where the checkpoint has left some projections out of quantization: which ones only its files tell.
    """
    return spec.fp8_block if keeps_fp8 and spec.fp8_complete else None


def kept_in_fp8(
    spec: ModelSpec, mesh: Mesh, layer: int, block: tuple[int, int], num_redundant_experts: int = 0
) -> tuple[int, int]:
    """Weights of a layer that one rank keeps in FP8, and their scales."""
    kept = [matrices for matrices in _quantized(spec, mesh, layer, num_redundant_experts) if matrices.keeps(block)]
    return sum(item.num_parameters for item in kept), sum(item.num_scales(block) for item in kept)


def same_in_fp8(spec: ModelSpec, mesh: Mesh, block: tuple[int, int], num_redundant_experts: int = 0) -> bool:
    """Whether the ranks of a mesh keep the very matrices in FP8 that one rank alone would."""
    return all(
        shared.keeps(block) == alone.keeps(block)
        for layer in range(spec.num_layers)
        for shared, alone in zip(
            _quantized(spec, mesh, layer, num_redundant_experts), _quantized(spec, Mesh(), layer, 0), strict=True
        )
    )


def _quantized(spec: ModelSpec, mesh: Mesh, layer: int, num_redundant_experts: int) -> Iterator[StackedMatrices]:
    """The projections of a layer, but for ``kv_b``: it is cut per head, so that it is always dequantized."""
    hidden, tp, heads = spec.hidden_size, mesh.tp, spec.num_heads_per_rank(mesh.tp)
    if mla := spec.mla:
        if mla.q_lora_rank:
            yield StackedMatrices((Share(mla.q_lora_rank, mla.q_lora_rank),), 0, hidden)
        queries = Share(heads * mla.qk_head_dim, spec.num_heads * mla.qk_head_dim)
        yield StackedMatrices((queries,), 0, mla.q_lora_rank or hidden)
        yield StackedMatrices((Share(mla.latent_dim, mla.latent_dim),), 0, hidden)
        values = Share(heads * mla.v_head_dim, spec.num_heads * mla.v_head_dim)
    else:
        values = Share(heads * spec.head_dim, spec.num_heads * spec.head_dim)
        keys = Share(spec.num_kv_heads_per_rank(tp) * spec.head_dim, spec.num_kv_heads * spec.head_dim)
        yield StackedMatrices((values, keys, keys), 0, hidden)
    yield StackedMatrices((values,), 1, hidden)
    if spec.moe is None or not spec.is_sparse(layer):
        yield from mlp_matrices(spec.intermediate_size, hidden, tp)
        return
    moe, slots, inner_tp = spec.moe, spec.moe.num_experts, tp
    if mesh.expert_parallel:
        slots, inner_tp = moe.slots_per_rank(mesh.dp * tp, num_redundant_experts), 1
    yield from mlp_matrices(moe.intermediate_size, hidden, inner_tp, slots)
    if moe.shared_intermediate_size:
        yield from mlp_matrices(moe.shared_intermediate_size, hidden, tp)


def mlp_matrices(inner: int, hidden: int, tp: int, copies: int = 1) -> Iterator[StackedMatrices]:
    """Gate and up in one, and down, of so many MLPs."""
    share = Share(inner // tp, inner)
    yield StackedMatrices((share, share), 0, hidden, copies)
    yield StackedMatrices((share,), 1, hidden, copies)
