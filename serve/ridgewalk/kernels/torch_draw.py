"""Drawing tokens in torch's operations: the reference."""

from __future__ import annotations

import torch

from ridgewalk.kernels.kernel_set import DrawRules

BLOCK = 128
"""Weights summed together on the way to a draw, so that only sums of blocks need FP64."""


def draw_tokens(logits: torch.Tensor, rules: DrawRules) -> torch.Tensor:
    """See `KernelSet.draw`."""
    vocab_size = logits.shape[1]
    temperature = rules.temperature.to(logits.device)
    scaled = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    weights = (scaled / temperature.clamp(min=1e-30)[:, None]).exp()
    cut = [row for row, kept in enumerate(_keeps_all(rules, vocab_size).tolist()) if not kept]
    if cut:
        weights[cut] = _truncate(weights[cut], rules.rows(cut, logits.device))
    drawn = _inverse_cdf(weights, rules.uniform.to(logits.device))
    return torch.where(temperature > 0, drawn, logits.argmax(dim=-1))


def _keeps_all(rules: DrawRules, vocab_size: int) -> torch.Tensor:
    whole = (rules.top_k == 0) | (rules.top_k >= vocab_size)
    return whole & (rules.top_p >= 1.0) & (rules.min_p <= 0.0)


def _truncate(weights: torch.Tensor, rules: DrawRules) -> torch.Tensor:
    """Set to zero the weights that are not kept. The rules' tensors are on the weights' device."""
    vocab_size = weights.shape[1]
    values, ids = weights.double().sort(dim=-1, descending=True, stable=True)  # equals in the order of their ids
    top_k = torch.where(rules.top_k > 0, rules.top_k, vocab_size)[:, None]
    values = values.masked_fill(torch.arange(vocab_size, device=weights.device) >= top_k, 0.0)
    total = values.sum(dim=-1, keepdim=True)  # top-k renormalizes, so top-p is a share of what it left
    before = values.cumsum(dim=-1) - values
    kept = ((before < rules.top_p[:, None] * total) | (rules.top_p[:, None] >= 1.0)) & (values >= rules.min_p[:, None])
    kept[:, 0] = True  # top_p may be 0
    return torch.zeros_like(weights).scatter_(1, ids, (values * kept).float())


def _inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF in the order of the vocabulary."""
    count, vocab_size = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -vocab_size % BLOCK)).view(count, -1, BLOCK)
    sums = blocks.sum(dim=-1).double()
    ends = sums.cumsum(dim=-1)
    target = (uniform * ends[:, -1])[:, None]
    block = _first_above(ends, target, sums)
    inside = target - (ends.gather(1, block) - sums.gather(1, block))
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double()
    return (block * BLOCK + _first_above(chosen.cumsum(dim=-1), inside, chosen)).squeeze(1)


def _first_above(sums: torch.Tensor, target: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Index of the first running sum over the target; of the last positive part when rounding leaves none."""
    index = torch.searchsorted(sums, target.contiguous(), right=True)
    positive = torch.arange(parts.shape[1], device=parts.device) * (parts > 0)
    return torch.minimum(index, positive.amax(dim=-1, keepdim=True))
