"""Drawing tokens in torch's operations: the reference, and what CUDA runs."""

from __future__ import annotations

import torch

from ridgewalk.kernels.kernel_set import DrawRules

FIRST_CANDIDATES = 1024
"""Tokens sorted first for top-p and min-p without top-k; a row whose kept set is larger sorts the vocabulary."""

BLOCK = 128
"""Weights summed together on the way to a draw, so that only sums of blocks need FP64."""


def draw_tokens(logits: torch.Tensor, rules: DrawRules) -> torch.Tensor:
    """See `KernelSet.draw`."""
    vocab_size = logits.shape[1]
    temperature = rules.temperature.to(logits.device)
    scaled = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    weights = (scaled / temperature.clamp(min=1e-30)[:, None]).exp()
    by_width: dict[int, list[int]] = {}
    for row, (top_k, top_p, min_p) in enumerate(
        zip(rules.top_k.tolist(), rules.top_p.tolist(), rules.min_p.tolist(), strict=True)
    ):
        width = _num_candidates(top_k, top_p, min_p, vocab_size)
        if width:
            by_width.setdefault(width, []).append(row)
    for width, rows in by_width.items():
        weights[rows] = _truncate(weights[rows], rules.rows(rows, logits.device), width)
    drawn = _inverse_cdf(weights, rules.uniform.to(logits.device))
    return torch.where(temperature > 0, drawn, logits.argmax(dim=-1))


def _num_candidates(top_k: int, top_p: float, min_p: float, vocab_size: int) -> int:
    """How many of the best tokens to sort; 0 when all are kept.

    A function of the row alone: among equal logits, which ones `topk` returns may depend on the number asked for.
    """
    if 0 < top_k < vocab_size:
        return min(vocab_size, 1 << (top_k - 1).bit_length())
    if top_p < 1.0 or min_p > 0.0:
        return min(vocab_size, FIRST_CANDIDATES)
    return 0


def _truncate(weights: torch.Tensor, rules: DrawRules, width: int) -> torch.Tensor:
    """Set to zero the weights that are not kept. The rules' tensors are on the weights' device."""
    vocab_size = weights.shape[1]
    values, ids = weights.topk(width, dim=-1) if width < vocab_size else weights.sort(dim=-1, descending=True)
    # Equal values in the order of their ids, so that the kept set does not hang on how `topk` works.
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).double().sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    top_k = torch.where(rules.top_k > 0, rules.top_k, vocab_size)[:, None]
    values = values.masked_fill(torch.arange(width, device=weights.device) >= top_k, 0.0)
    whole = weights.double().sum(dim=-1, keepdim=True)  # top-k renormalizes, so top-p is a share of what it left
    total = torch.where(top_k < vocab_size, values.sum(dim=-1, keepdim=True), whole)
    before = values.cumsum(dim=-1) - values
    kept = ((before < rules.top_p[:, None] * total) | (rules.top_p[:, None] >= 1.0)) & (values >= rules.min_p[:, None])
    kept[:, 0] = True  # top_p may be 0
    truncated = torch.zeros_like(weights).scatter_(1, ids, (values * kept).float())
    # Every candidate was kept and more of the vocabulary may be: decide over all of it.
    open_ended = (kept[:, -1:] & (top_k >= vocab_size)).squeeze(1).nonzero().squeeze(1).tolist()
    if width < vocab_size and open_ended:
        again = rules.rows(open_ended, weights.device)
        truncated[open_ended] = _truncate(weights[open_ended], again, vocab_size)
    return truncated


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
