"""What a rank remembers of its sequences between steps: tokens and block tables, in arrays with one row a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import NO_TOKEN, PLACEHOLDER_TOKEN, GroupBatch, NewSequence


class StepError(RuntimeError):
    """A step contradicts what the rank knows (scheduler and rank have diverged); the replica must restart."""


class SequenceTable:
    """Rows are reused after their sequence is dropped; numpy commits the memory of a row when it is first written."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []
        self._sampling: list[SamplingParams | None] = []
        blocks_per_sequence = -(-max_model_len // block_size) + 1
        self.block_size = block_size
        self.token_ids = np.zeros((0, max_model_len + 1), dtype=np.int32)
        self.block_table = np.zeros((0, blocks_per_sequence), dtype=np.int32)
        self.num_tokens = np.zeros(0, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(0, dtype=np.int64)
        self.num_blocks = np.zeros(0, dtype=np.int64)
        self.sampled = np.zeros(0, dtype=np.int64)  # the token each row sampled last, for placeholders
        self._grow(max_num_seqs)

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._row_of

    def sampling(self, row: int) -> SamplingParams:
        """Sampling parameters of the sequence in a row."""
        params = self._sampling[row]
        assert params is not None
        return params

    def rows(self, seq_ids: Sequence[int]) -> np.ndarray:
        """Rows of sequences, int64.

        Raises:
            StepError: one is unknown.
        """
        try:
            return np.fromiter((self._row_of[seq_id] for seq_id in seq_ids), dtype=np.int64, count=len(seq_ids))
        except KeyError as error:
            raise StepError(f"sequence {error.args[0]} was scheduled but never created on this rank") from None

    def apply(self, batch: GroupBatch) -> tuple[np.ndarray, list[int], list[int]]:
        """Bring the table up to a step: drop, create, append blocks and tokens.

        Returns:
            Rows of ``batch.seq_ids``; rows that were dropped; rows that were created (also among the dropped ones if
            they were reused).

        Raises:
            StepError: the batch does not fit what the rank knows.
        """
        dropped = [self._drop(seq_id) for seq_id in batch.dropped_seq_ids if seq_id in self._row_of]
        created = [self._create(new) for new in batch.new_sequences]
        rows = self.rows(batch.seq_ids)
        for row, block_ids in zip(rows, batch.new_block_ids, strict=True):
            if block_ids:
                start = self.num_blocks[row]
                stop = start + len(block_ids)
                if stop > self.block_table.shape[1]:
                    raise StepError(f"a block table of {stop} blocks exceeds the longest sequence")
                self.block_table[row, start:stop] = block_ids
                self.num_blocks[row] = stop
        self._append_tokens(rows, np.asarray(batch.last_token_ids, dtype=np.int64))
        return rows, dropped, created

    def _append_tokens(self, rows: np.ndarray, last: np.ndarray) -> None:
        appended = last != NO_TOKEN
        if not appended.any():
            return
        rows, last = rows[appended], last[appended]
        tokens = np.where(last == PLACEHOLDER_TOKEN, self.sampled[rows], last)
        if (tokens < 0).any():
            raise StepError("a placeholder stands for a token that this rank never sampled (is tokens_broadcast off?)")
        if (self.num_tokens[rows] >= self.token_ids.shape[1]).any():
            raise StepError("a sequence grew past max_model_len")
        self.token_ids[rows, self.num_tokens[rows]] = tokens
        self.num_tokens[rows] += 1

    def _create(self, new: NewSequence) -> int:
        if new.seq_id in self._row_of:
            raise StepError(f"sequence {new.seq_id} was created twice")
        count = len(new.token_ids)
        if count > self.token_ids.shape[1]:
            raise StepError(f"sequence {new.seq_id} has {count} tokens, more than max_model_len")
        if not self._free:
            self._grow(2 * len(self._sampling))
        row = self._free.pop()
        self._row_of[new.seq_id] = row
        self._sampling[row] = new.sampling
        self.token_ids[row, :count] = new.token_ids
        self.num_tokens[row] = count
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        self.num_blocks[row] = 0
        self.sampled[row] = NO_TOKEN
        return row

    def _drop(self, seq_id: int) -> int:
        row = self._row_of.pop(seq_id)
        self._sampling[row] = None
        self._free.append(row)
        return row

    def _grow(self, size: int) -> None:
        """Add rows. With steps in flight there can briefly be more sequences than run in one step."""
        before = len(self._sampling)
        for name in ("token_ids", "block_table", "num_tokens", "num_prompt_tokens", "num_blocks", "sampled"):
            old = getattr(self, name)
            new = np.zeros((size, *old.shape[1:]), dtype=old.dtype)
            new[:before] = old
            setattr(self, name, new)
        self._sampling += [None] * (size - before)
        self._free += range(size - 1, before - 1, -1)
