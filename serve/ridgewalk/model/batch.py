"""The arrays of one step: which tokens are computed, where their keys and values go, which rows are sampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ridgewalk.engine.step import GroupBatch
from ridgewalk.model.sequence_table import SequenceTable, StepError


@dataclass(frozen=True)
class StepTensors:
    """Inputs of the model for one step; ``T`` tokens of ``B`` sequences, one sequence after the other."""

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    slot_mapping: torch.Tensor  # int64 [T]
    cu_seqlens_q: torch.Tensor  # int32 [B + 1]
    seqused_k: torch.Tensor  # int32 [B]
    block_table: torch.Tensor  # int32 [B, max_blocks]
    max_seqlen_q: int
    max_seqlen_k: int
    sampled_tokens: torch.Tensor | None  # int64: those of the T whose logits are wanted; None: all, in order
    num_sampled: int


def build_step(table: SequenceTable, rows: np.ndarray, batch: GroupBatch, device: torch.device) -> StepTensors:
    """Lay out one step from the sequences' state.

    Raises:
        StepError: more tokens are scheduled than are known, or than the block table has room for.
    """
    computed = np.asarray(batch.num_computed_tokens, dtype=np.int64)
    scheduled = np.asarray(batch.num_scheduled_tokens, dtype=np.int64)
    samples = np.asarray(batch.samples, dtype=bool)
    lengths = computed + scheduled
    if (scheduled < 1).any() or (lengths > table.num_tokens[rows]).any():
        raise StepError(f"{scheduled.tolist()} tokens after {computed.tolist()} exceed the tokens that are known")
    if (lengths > table.num_blocks[rows] * table.block_size).any():
        raise StepError("tokens are scheduled past the end of their block table")
    ends = np.cumsum(scheduled)
    starts = ends - scheduled
    total = int(ends[-1])
    if total == len(rows):  # every sequence decodes one token
        token_rows, positions = rows, computed
    else:
        token_rows = np.repeat(rows, scheduled)
        positions = np.arange(total) + np.repeat(computed - starts, scheduled)
    blocks = table.block_table[token_rows, positions // table.block_size].astype(np.int64)
    max_seqlen_k = int(lengths.max())
    width = -(-max_seqlen_k // table.block_size)
    cu_seqlens = np.zeros(len(rows) + 1, dtype=np.int32)
    cu_seqlens[1:] = ends
    num_sampled = int(samples.sum())
    every = num_sampled == total

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return StepTensors(
        token_ids=put(table.token_ids[token_rows, positions].astype(np.int64)),
        positions=put(positions),
        slot_mapping=put(blocks * table.block_size + positions % table.block_size),
        cu_seqlens_q=put(cu_seqlens),
        seqused_k=put(lengths.astype(np.int32)),
        block_table=put(table.block_table[rows, :width]),
        max_seqlen_q=int(scheduled.max()),
        max_seqlen_k=max_seqlen_k,
        sampled_tokens=None if every else put(ends[samples] - 1),
        num_sampled=num_sampled,
    )
