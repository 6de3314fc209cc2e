"""Mixture-of-experts layers: their sizes and how tokens choose experts, read from a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ridgewalk.placement.config_fields import natural, real, whole

ExpertNames = Literal["mixtral", "qwen3_moe", "deepseek"]
"""Whose tensor names a checkpoint's sparse layers use."""


@dataclass(frozen=True)
class MoESpec:
    """Sparse layers of a model and the rules of their router.

    A token's scores are the softmax or sigmoid of its router logits. ``top_k`` experts are chosen by score, plus the
    router's bias with ``correction_bias``, among those of the best ``topk_groups`` of ``num_groups`` groups; the
    weights are the scores without bias, divided by their sum with ``norm_topk_prob``, times ``routed_scaling_factor``.
    """

    num_experts: int
    top_k: int
    intermediate_size: int  # of one expert
    sparse_layers: tuple[int, ...]  # ascending; the other layers are dense
    shared_intermediate_size: int = 0  # all shared experts together, which every token passes; 0: none
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2"] = "max"  # top2: the sum of a group's two best biased scores
    correction_bias: bool = False
    names: ExpertNames = "mixtral"

    def __post_init__(self) -> None:
        """Refuse a router that cannot choose ``top_k`` experts."""
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"num_experts_per_tok must be 1 to {self.num_experts} (the experts), got {self.top_k}")
        if self.num_experts % self.num_groups or not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(
                f"n_group {self.num_groups} must divide the {self.num_experts} experts, and topk_group "
                f"{self.topk_groups} must be 1 to n_group"
            )
        if self.num_experts // self.num_groups * self.topk_groups < self.top_k:
            raise ValueError(
                f"topk_group {self.topk_groups} leaves fewer experts than num_experts_per_tok {self.top_k}"
            )

    def slots_per_rank(self, ep: int, num_redundant_experts: int = 0) -> int:
        """Experts that each of ``ep`` expert-parallel ranks holds in a sparse layer, copies included."""
        return (self.num_experts + num_redundant_experts) // ep


def read_mixtral(config: Mapping[str, Any]) -> MoESpec:
    """Mixtral: every layer is sparse."""
    return MoESpec(
        num_experts=_num_experts(config, 8),
        top_k=natural(config, "num_experts_per_tok", 2),
        intermediate_size=whole(config, "intermediate_size"),
        sparse_layers=tuple(range(whole(config, "num_hidden_layers"))),
        names="mixtral",
    )


def read_qwen3_moe(config: Mapping[str, Any]) -> MoESpec | None:
    """Qwen3-MoE: every ``decoder_sparse_step``-th layer is sparse, but for ``mlp_only_layers``. None: none is."""
    num_experts = _num_experts(config, 128)
    step, dense = natural(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    layers = range(whole(config, "num_hidden_layers"))
    sparse = tuple(layer for layer in layers if step and (layer + 1) % step == 0 and layer not in dense)
    if not num_experts or not sparse:
        return None
    return MoESpec(
        num_experts=num_experts,
        top_k=natural(config, "num_experts_per_tok", 8),
        intermediate_size=whole(config, "moe_intermediate_size"),
        sparse_layers=sparse,
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        names="qwen3_moe",
    )


def read_deepseek_v2(config: Mapping[str, Any]) -> MoESpec | None:
    """DeepSeek-V2: softmax scores, scaled and never normalised. None: no layer is sparse."""
    method = config.get("topk_method", "greedy")
    _only(config, "topk_method", "greedy", "group_limited_greedy")
    _only(config, "scoring_func", "softmax")
    if config.get("norm_topk_prob"):
        raise ValueError("norm_topk_prob is not supported for DeepSeek-V2 (transformers does not normalise there)")
    grouped = method == "group_limited_greedy"
    return _deepseek(
        config,
        first_dense=0,
        num_experts=64,
        num_shared=2,
        scaling=1.0,
        num_groups=whole(config, "n_group") if grouped else 1,
        topk_groups=whole(config, "topk_group") if grouped else 1,
    )


def read_deepseek_v3(config: Mapping[str, Any]) -> MoESpec | None:
    """DeepSeek-V3 and R1: sigmoid scores, chosen with a bias within groups. None: no layer is sparse."""
    _only(config, "topk_method", "noaux_tc")
    _only(config, "scoring_func", "sigmoid")
    return _deepseek(
        config,
        first_dense=3,
        num_experts=256,
        num_shared=1,
        scaling=2.5,
        scoring="sigmoid",
        norm_topk_prob=bool(config.get("norm_topk_prob", True)),
        num_groups=natural(config, "n_group", 8) or 1,
        topk_groups=natural(config, "topk_group", 4) or 1,
        group_score="top2",
        correction_bias=True,
    )


def _deepseek(
    config: Mapping[str, Any],
    first_dense: int,
    num_experts: int,
    num_shared: int,
    scaling: float,
    *,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    norm_topk_prob: bool = False,
    num_groups: int,
    topk_groups: int,
    group_score: Literal["max", "top2"] = "max",
    correction_bias: bool = False,
) -> MoESpec | None:
    """What V2 and V3 read alike; the positional numbers are transformers' defaults of missing fields."""
    experts = natural(config, "n_routed_experts", num_experts)
    first_sparse = natural(config, "first_k_dense_replace", first_dense)
    frequency = natural(config, "moe_layer_freq", 1) or 1
    layers = range(first_sparse, whole(config, "num_hidden_layers"))
    sparse = tuple(layer for layer in layers if layer % frequency == 0)
    if not experts or not sparse:
        return None
    size = whole(config, "moe_intermediate_size")
    return MoESpec(
        num_experts=experts,
        top_k=natural(config, "num_experts_per_tok", 8),
        intermediate_size=size,
        sparse_layers=sparse,
        shared_intermediate_size=size * natural(config, "n_shared_experts", num_shared),
        scoring=scoring,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=real(config, "routed_scaling_factor", scaling),
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score=group_score,
        correction_bias=correction_bias,
        names="deepseek",
    )


def _num_experts(config: Mapping[str, Any], default: int) -> int:
    """transformers 5 writes ``num_local_experts`` where hub configs of Qwen3-MoE have ``num_experts``."""
    field = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    return natural(config, field, default)


def _only(config: Mapping[str, Any], field: str, *values: str) -> None:
    if config.get(field, values[0]) not in values:
        supported = ", ".join(repr(value) for value in values)
        raise ValueError(f"{field} {config[field]!r} is not supported (supported: {supported})")
