"""Edits of logits that depend on what a sequence holds already: penalties, bias, minimum length."""

from __future__ import annotations

import numpy as np
import torch

from ridgewalk.engine.sampling import SamplingParams


class TokenCounts:
    """How often each token occurs in one sequence, brought up to date as tokens arrive."""

    def __init__(self, vocab_size: int) -> None:
        self._seen = np.zeros(vocab_size, dtype=bool)  # in prompt or output
        self._outputs = np.zeros(vocab_size, dtype=np.int32)  # occurrences in the output
        self._ids = np.zeros(0, dtype=np.int64)  # those seen
        self._counted = 0  # tokens of the sequence

    def update(self, token_ids: np.ndarray, num_prompt_tokens: int) -> None:
        """Count the tokens that were appended since the last call. ``token_ids`` are all of the sequence's."""
        fresh = token_ids[self._counted :].astype(np.int64)
        outputs = fresh[max(num_prompt_tokens - self._counted, 0) :]
        np.add.at(self._outputs, outputs, 1)
        unseen = np.unique(fresh[~self._seen[fresh]])
        self._seen[unseen] = True
        self._ids = np.concatenate((self._ids, unseen))
        self._counted = len(token_ids)

    def penalize(self, logits: torch.Tensor, sampling: SamplingParams) -> None:
        """Edit one row of FP32 logits in place.

        Repetition (arXiv 1909.05858): logits of tokens in prompt or output are divided by the penalty where positive
        and multiplied where negative. Then frequency x count and presence are subtracted over the output (OpenAI's
        definition).
        """
        ids = torch.from_numpy(self._ids).to(logits.device)
        counts = torch.from_numpy(self._outputs[self._ids]).to(logits.device)
        values = logits[ids]
        if sampling.repetition_penalty != 1.0:
            penalty = sampling.repetition_penalty
            values = torch.where(values > 0, values / penalty, values * penalty)
        values = values - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        logits[ids] = values


def needs_counts(sampling: SamplingParams) -> bool:
    """True when the sequence's tokens must be counted."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def edit_logits(
    logits: torch.Tensor, sampling: SamplingParams, num_output_tokens: int, counts: TokenCounts | None
) -> None:
    """Apply penalties, then bias, then the minimum length to one row of FP32 logits, in place.

    Ids outside the vocabulary are ignored (a client may name any).
    """
    if counts is not None:
        counts.penalize(logits, sampling)
    vocab_size = logits.shape[0]
    biased = [(token, bias) for token, bias in sampling.logit_bias if 0 <= token < vocab_size]
    if biased:
        ids = torch.tensor([token for token, _ in biased], device=logits.device)
        logits.index_add_(0, ids, torch.tensor([bias for _, bias in biased], device=logits.device))
    if num_output_tokens < sampling.min_tokens:
        stops = [token for token in sampling.stop_token_ids if 0 <= token < vocab_size]
        logits[stops] = -torch.inf
