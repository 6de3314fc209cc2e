"""From logits to tokens. Runs on the rank that holds the logits of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import TokenLogprobs
from ridgewalk.kernels.kernel_set import DrawRules, KernelSet
from ridgewalk.model.penalties import TokenCounts, edit_logits
from ridgewalk.model.randomness import uniforms

FLOOR = -9999.0
"""Reported instead of a log-probability of minus infinity, which JSON cannot carry."""


@dataclass(frozen=True)
class SampleRow:
    """What the sampler needs to know of one row of logits."""

    sampling: SamplingParams
    position: int  # of the token to be sampled, in the sequence
    num_output_tokens: int  # before it
    counts: TokenCounts | None = None  # up to date; None when no penalty is asked for
    forced: int | None = None  # the token to take, whatever the logits say


def is_plain_greedy(sampling: SamplingParams) -> bool:
    """True when the token is the arg max of the unedited logits and nothing else is reported."""
    return sampling.is_greedy and sampling.logprobs is None and not sampling.changes_logits


def sample(
    logits: torch.Tensor, rows: Sequence[SampleRow], kernels: KernelSet
) -> tuple[torch.Tensor, list[TokenLogprobs | None] | None]:
    """Choose one token for each row.

    Order of operations: penalties, bias, minimum length; then (log-probabilities are taken here) temperature, top-k,
    top-p, min-p and a draw at `uniforms(seed, position)`, so that it depends on its own row alone. A forced token takes
    the place of the draw; its log-probability is what the model gives it.

    Args:
        logits: ``[len(rows), vocab_size]``, any float dtype; not changed.
        rows: parallel to the rows of ``logits``.
        kernels: of the logits' device.

    Returns:
        Token ids, int64 ``[len(rows)]``, on the logits' device; and log-probabilities of the rows that asked, or None
        when none did.
    """
    if any(row.sampling.changes_logits for row in rows):
        logits = logits.to(torch.float32, copy=True)
        for index, row in enumerate(rows):
            if row.sampling.changes_logits:
                edit_logits(logits[index], row.sampling, row.num_output_tokens, row.counts)
    tokens = kernels.draw(logits, _rules(rows))
    force(tokens, [row.forced for row in rows])
    return tokens, _logprobs(logits, tokens, rows)


def force(tokens: torch.Tensor, forced: Sequence[int | None]) -> None:
    """Put forced tokens in the place of the chosen ones."""
    for index, token_id in enumerate(forced):
        if token_id is not None:
            tokens[index] = token_id


def _rules(rows: Sequence[SampleRow]) -> DrawRules:
    params = [row.sampling for row in rows]
    numbers = uniforms(np.array([p.seed for p in params]), np.array([row.position for row in rows]))
    return DrawRules(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32),
        top_k=torch.tensor([p.top_k for p in params]),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float64),
        uniform=torch.from_numpy(numbers),
    )


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[SampleRow]
) -> list[TokenLogprobs | None] | None:
    asked = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not asked:
        return None
    part = torch.log_softmax(logits[asked].float(), dim=-1)
    chosen = part.gather(1, tokens[asked][:, None])
    # Among equals the lower id comes first, as in the list of alternatives.
    ids = torch.arange(part.shape[1], device=part.device)
    ahead = (part > chosen) | ((part == chosen) & (ids < tokens[asked][:, None]))
    ranks = (ahead.sum(dim=-1) + 1).tolist()
    widest = max(rows[index].sampling.logprobs or 0 for index in asked)
    top_values, top_ids = _top(part, min(widest, part.shape[1]))
    reported: list[TokenLogprobs | None] = [None] * len(rows)
    for line, index in enumerate(asked):
        wanted = rows[index].sampling.logprobs or 0
        top = [(token, max(value, FLOOR)) for token, value in zip(top_ids[line], top_values[line], strict=True)]
        reported[index] = TokenLogprobs(max(float(chosen[line]), FLOOR), ranks[line], top[:wanted])
    return reported


def _top(logprobs: torch.Tensor, count: int) -> tuple[list[list[float]], list[list[int]]]:
    if count == 0:
        return [[]] * len(logprobs), [[]] * len(logprobs)
    values, ids = logprobs.topk(count, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values.tolist(), ids.gather(1, order).tolist()
