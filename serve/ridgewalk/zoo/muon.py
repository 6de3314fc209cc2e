"""Muon for stacks of matrices, such as the experts of a layer; `torch.optim.Muon` takes single matrices only.

Muon: K. Jordan, https://kellerjordan.github.io/posts/muon/; the scale of its step: arXiv 2502.16982, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steepest at zero; singular values end in about 0.7 .. 1.2
ITERATIONS = 5
EPS = 1e-7


def orthogonalize(stack: torch.Tensor) -> torch.Tensor:
    """About U V^T of each matrix U S V^T of a [n, rows, columns] stack, in bfloat16, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = stack.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class StackedMuon(torch.optim.Optimizer):
    """Nesterov momentum whose steps are orthogonalized matrix by matrix, with decoupled weight decay.

    Parameters are [n, rows, columns]. A step has the RMS that AdamW's have (`match_rms_adamw` of `torch.optim.Muon`),
    so that both take one learning rate.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if any(p.dim() != 3 for group in self.param_groups for p in group["params"]):
            raise ValueError("StackedMuon takes stacks of matrices: three dimensions")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                average = state.setdefault("momentum_buffer", torch.zeros_like(param))
                average.lerp_(param.grad, 1 - momentum)
                update = orthogonalize(param.grad.lerp(average, momentum))
                param.mul_(1 - lr * group["weight_decay"])
                param.add_(update, alpha=-lr * 0.2 * max(param.shape[1:]) ** 0.5)
