"""Sampling from logits whose vocabulary is divided over the ranks of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import TokenLogprobs
from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.model.penalties import TokenCounts, needs_counts
from ridgewalk.model.sampler import SampleRow, force, is_plain_greedy, sample
from ridgewalk.model.sequence_table import SequenceTable
from ridgewalk.model.thinking import Thinking
from ridgewalk.parallel.communicator import Communicator
from ridgewalk.placement.model_spec import ModelSpec

Choice = tuple[torch.Tensor | None, list[TokenLogprobs | None] | None]


class ShardedSampler:
    """The first rank of the group samples; the others hand it their logits, or only their best ones."""

    def __init__(self, spec: ModelSpec, kernels: KernelSet, tp: Communicator, table: SequenceTable) -> None:
        self._vocab_size = spec.vocab_size
        self._vocab_size_per_rank = spec.vocab_size_per_rank(tp.size)
        self._vocab_start = tp.rank * self._vocab_size_per_rank
        self._kernels = kernels
        self._tp = tp
        self._table = table
        self._counts: dict[int, TokenCounts] = {}  # by row, of the sequences with penalties
        self._thinking: dict[int, Thinking] = {}  # by row, of the sequences with a thinking budget

    def follow(self, dropped: Iterable[int], created: Iterable[int]) -> None:
        """Forget rows of the table that were dropped, and take up those that were created."""
        for row in dropped:
            self._counts.pop(row, None)
            self._thinking.pop(row, None)
        if self._tp.rank != 0:
            return
        for row in created:
            sampling = self._table.sampling(row)
            if needs_counts(sampling):
                self._counts[row] = TokenCounts(self._vocab_size)
            if sampling.reasoning is not None:
                self._thinking[row] = Thinking(sampling.reasoning)

    def choose(self, logits: torch.Tensor, rows: np.ndarray) -> Choice:
        """One token a row, and log-probabilities where asked, on the first rank; None on the others.

        Args:
            logits: ``[len(rows), vocab_per_rank]``: this rank's shard of the vocabulary.
            rows: of the table.
        """
        params = [self._table.sampling(row) for row in rows]
        if all(is_plain_greedy(p) for p in params):
            tokens = self._kernels.arg_max(logits)[1] if self._tp.size == 1 else self._gather_arg_max(logits)
            if tokens is not None and self._thinking:
                force(tokens, [self._forced(row) for row in rows.tolist()])
            return tokens, None
        if self._tp.size > 1:
            gathered = self._tp.gather(logits)
            if gathered is None:
                return None, None
            logits = gathered.transpose(0, 1).flatten(1)
        return sample(logits[:, : self._vocab_size], [self._describe(row) for row in rows.tolist()], self._kernels)

    def warm_up(self, dtype: torch.dtype, device: torch.device) -> None:
        """Draw once, so that no request waits until the kernels are compiled: of logits as computed and as edited."""
        if self._tp.rank != 0:
            return
        width = self._vocab_size_per_rank * self._tp.size
        for each in {dtype, torch.float32}:
            logits = torch.zeros((1, width), dtype=each, device=device)[:, : self._vocab_size]
            sample(logits, [SampleRow(SamplingParams(1, top_p=0.5, top_k=2), 0, 0)], self._kernels)

    def _describe(self, row: int) -> SampleRow:
        table = self._table
        position, num_prompt = int(table.num_tokens[row]), int(table.num_prompt_tokens[row])
        counts = self._counts.get(row)
        if counts is not None:
            counts.update(table.token_ids[row, :position], num_prompt)
        return SampleRow(table.sampling(row), position, position - num_prompt, counts, self._forced(row))

    def _forced(self, row: int) -> int | None:
        """The token that ends the row's thinking, when it has thought for as long as it may."""
        thinking, sampling = self._thinking.get(row), self._table.sampling(row)
        if thinking is None or sampling.reasoning is None:
            return None
        thinking.update(self._table.token_ids[row, self._table.num_prompt_tokens[row] : self._table.num_tokens[row]])
        return sampling.reasoning.close_token_id if thinking.must_end else None

    def _gather_arg_max(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Arg max over the shards: two numbers a row travel instead of a row of logits."""
        values, indices = self._kernels.arg_max(logits)
        gathered = self._tp.gather(torch.stack((values.double(), (indices + self._vocab_start).double())))
        if gathered is None:
            return None
        best = gathered[:, 0].argmax(dim=0, keepdim=True)  # of equals the first rank: the lowest token id
        return gathered[:, 1].gather(0, best).squeeze(0).long()
