"""The router of a sparse layer: which experts a token goes to, as transformers computes it for each family."""

from __future__ import annotations

import torch

from ridgewalk.kernels.expert_kernels import RouterRules
from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.placement.moe_spec import MoESpec


class Router:
    """Replicated on every rank. DeepSeek's logits are FP32 products; the others' are rounded to the model's dtype."""

    def __init__(
        self, moe: MoESpec, parameters: dict[str, torch.Tensor], kernels: KernelSet, dtype: torch.dtype
    ) -> None:
        """Take ``router`` ``[E, H]`` and, where there is one, ``router_bias`` FP32 ``[E]`` out of the parameters."""
        self._kernels = kernels
        self._rules = router_rules(moe)
        self._dtype = torch.float32 if moe.names == "deepseek" else dtype
        self._matrix = kernels.pack(parameters.pop("router").to(self._dtype))
        self._bias = parameters.pop("router_bias") if moe.correction_bias else None

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights, FP32 ``[T, k]``, and experts, int64 ``[T, k]``, of each row of ``[T, H]``."""
        wide = hidden if hidden.dtype == self._dtype else hidden.to(self._dtype)
        return self._kernels.route(self._kernels.linear(wide, self._matrix), self._rules, self._bias)


def router_rules(moe: MoESpec) -> RouterRules:
    """A model's rules, as the kernels take them."""
    return RouterRules(
        top_k=moe.top_k,
        scoring=moe.scoring,
        num_groups=moe.num_groups,
        topk_groups=moe.topk_groups,
        group_score=moe.group_score,
        normalize=moe.norm_topk_prob,
        scale=moe.routed_scaling_factor,
    )
