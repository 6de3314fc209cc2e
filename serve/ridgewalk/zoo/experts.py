"""How evenly a mixture-of-experts model (DeepSeek-V3's kind of router) uses its experts, and keeping it even."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

BIAS = "e_score_correction_bias"


def routers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The routers of the sparse layers, in order; none for a dense model."""
    return [module for module in model.modules() if hasattr(module, BIAS)]


class LoadMeter:
    """Counts the tokens that each expert received in the calling thread's last forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.routers = routers_of(model)
        self._last = threading.local()
        self._hooks = [r.register_forward_hook(functools.partial(self._keep, i)) for i, r in enumerate(self.routers)]

    def _keep(self, layer: int, router: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        self._last.__dict__[layer] = output[2]  # (logits, weights, the experts chosen)

    def loads(self, real: torch.Tensor) -> torch.Tensor:
        """Tokens per expert, [sparse layers, experts]; only tokens where `real` ([batch, length], bool) count."""
        import torch

        if not self.routers:
            return torch.zeros(0, 0, dtype=torch.long)
        experts = len(getattr(self.routers[0], BIAS))
        chosen = [self._last.__dict__[layer][real.flatten()].flatten() for layer in range(len(self.routers))]
        return torch.stack([torch.bincount(c, minlength=experts) for c in chosen])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def balance(routers: list[nn.Module], loads: torch.Tensor, speed: float) -> None:
    """Raise the bias of experts that got less than the mean of `loads` ([layers, experts]), lower that of the others.

    The bias decides who is chosen, never how much an expert's output weighs, so no loss term is needed: the
    auxiliary-loss-free balancing of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; arXiv 2408.15664).
    """
    import torch

    for router, load in zip(routers, loads.float(), strict=True):
        getattr(router, BIAS).add_(torch.sign(load.mean() - load), alpha=speed)


def worst_over_mean(loads: torch.Tensor) -> list[float]:
    """The busiest expert's load over the mean, for each sparse layer."""
    return [round(float(load.max() / load.mean()), 4) for load in loads.double()]
