"""Keeps the attention of a model with MLA from growing too sharp to learn from, in place of norms of queries and keys.

Muon makes weights grow steadily, and with them the attention's logits; a softmax that has picked one position gives no
gradient to any other. QK-Clip of Kimi K2 (arXiv 2507.20534, section 2.1) scales the weights of a head down when its
largest logit exceeds a limit. Here the limit is on the product of the longest query and the longest key, which is
cheap to know and what such norms would bound.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def attentions_of(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of each layer, in order, if it is MLA with a low rank of the queries; none otherwise."""
    return [
        module for module in model.modules() if getattr(module, "q_lora_rank", None) and hasattr(module, "q_b_proj")
    ]


class SharpnessMeter:
    """Bounds the attention's logits in the calling thread's last forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.attentions = attentions_of(model)
        self._last = threading.local()
        self._hooks = [
            getattr(attention, name).register_forward_hook(functools.partial(self._keep, (layer, name)))
            for layer, attention in enumerate(self.attentions)
            for name in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
        ]

    def _keep(self, key: tuple[int, str], module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._last.__dict__[key] = output.detach()

    def bounds(self, real: torch.Tensor) -> torch.Tensor:
        """Longest query times longest key, scaled as logits are, [layers, heads]; over tokens where `real` holds."""
        import torch

        result = [self._bound(layer, attention, real.flatten()) for layer, attention in enumerate(self.attentions)]
        self._last.__dict__.clear()
        return torch.stack(result) if result else torch.zeros(0, 0)

    def _bound(self, layer: int, attention: nn.Module, real: torch.Tensor) -> torch.Tensor:
        """Rotations keep lengths, so the projections tell them."""
        outputs = {
            name: value.flatten(0, -2)[real].float() for (i, name), value in self._last.__dict__.items() if i == layer
        }
        heads = (len(outputs["q_b_proj"]), attention.num_heads, -1)
        queries = outputs["q_b_proj"].view(heads).norm(dim=-1)
        rotated = outputs["kv_a_proj_with_mqa"][:, attention.kv_lora_rank :].norm(dim=-1, keepdim=True)
        keys = outputs["kv_b_proj"].view(heads)[..., : attention.qk_nope_head_dim].norm(dim=-1).hypot(rotated)
        return queries.amax(dim=0) * keys.amax(dim=0) * attention.scaling

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def clip(attentions: list[nn.Module], bounds: torch.Tensor, limit: float) -> None:
    """Scale the queries and keys of heads whose bound ([layers, heads]) exceeds `limit` so that it meets it.

    The rotated part of the keys is shared by the heads, so the queries alone take that part's whole share.
    """
    import torch

    with torch.no_grad():
        for attention, bound in zip(attentions, bounds, strict=True):
            factor = (limit / bound).clamp(max=1.0)[:, None, None]
            plain, heads = attention.qk_nope_head_dim, attention.num_heads
            queries = attention.q_b_proj.weight.unflatten(0, (heads, -1))
            keys = attention.kv_b_proj.weight.unflatten(0, (heads, -1))
            queries[:, :plain] *= factor.sqrt()
            queries[:, plain:] *= factor
            keys[:, :plain] *= factor.sqrt()
