"""Ranks without a model: they check the contract of `StepInput` and "sample" a known function of the tokens."""

from __future__ import annotations

import zlib

import msgspec

from ridgewalk.engine.step import (
    NO_TOKEN,
    PLACEHOLDER_TOKEN,
    GroupBatch,
    GroupOutput,
    NewSequence,
    RankTimings,
    StepInput,
    StepOutput,
)


def next_token(token_ids: list[int]) -> int:
    """The token that these ranks sample after ``token_ids``: depends on every token before it."""
    return zlib.crc32(repr(token_ids).encode()) % 1000


class FakeGroup:
    """KV as a map from slot to the prefix that it was computed from: reading a wrong block is noticed."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def execute(self, batch: GroupBatch) -> GroupOutput:
        for seq_id in batch.dropped_seq_ids:
            del self.tokens[seq_id], self.blocks[seq_id]
        for new in batch.new_sequences:
            self._create(new)
        sampled = [NO_TOKEN] * len(batch.seq_ids)
        owners: dict[tuple[int, int], int] = {}
        for row, seq_id in enumerate(batch.seq_ids):  # every write of a step before any read
            self._extend(batch, row, seq_id)
            for position in self._positions(batch, row):
                slot = self._slot(seq_id, position)
                assert owners.setdefault(slot, seq_id) == seq_id, "two sequences write one slot"
                self.slots[slot] = tuple(self.tokens[seq_id][: position + 1])
        for row, seq_id in enumerate(batch.seq_ids):
            end = batch.num_computed_tokens[row] + batch.num_scheduled_tokens[row]
            for position in range(end):
                assert self.slots[self._slot(seq_id, position)] == tuple(self.tokens[seq_id][: position + 1])
            assert batch.samples[row] == (end == len(self.tokens[seq_id]))
            if batch.samples[row]:
                sampled[row] = next_token(self.tokens[seq_id])
                self._pending[seq_id] = sampled[row]
        return GroupOutput(sampled)

    @property
    def _pending(self) -> dict[int, int]:
        return self.__dict__.setdefault("pending", {})

    def _create(self, new: NewSequence) -> None:
        assert new.seq_id not in self.tokens
        self.tokens[new.seq_id] = list(new.token_ids)
        self.blocks[new.seq_id] = []

    def _extend(self, batch: GroupBatch, row: int, seq_id: int) -> None:
        assert batch.num_scheduled_tokens[row] > 0
        self.blocks[seq_id] += batch.new_block_ids[row]
        last = batch.last_token_ids[row]
        if last == PLACEHOLDER_TOKEN:
            last = self._pending.pop(seq_id)
        if last != NO_TOKEN:
            self.tokens[seq_id].append(last)

    def _positions(self, batch: GroupBatch, row: int) -> range:
        start = batch.num_computed_tokens[row]
        return range(start, start + batch.num_scheduled_tokens[row])

    def _slot(self, seq_id: int, position: int) -> tuple[int, int]:
        return self.blocks[seq_id][position // self.block_size], position % self.block_size


class FakeExecutor:
    """Runs steps when they are collected, at most ``per_collect`` at a time, over the real wire format."""

    def __init__(self, block_size: int, num_groups: int = 1, per_collect: int = 1) -> None:
        self.groups = [FakeGroup(block_size) for _ in range(num_groups)]
        self.per_collect = per_collect
        self.submitted: list[bytes] = []
        self.steps: list[StepInput] = []
        self.closed = False

    def submit(self, step: StepInput) -> None:
        self.submitted.append(msgspec.msgpack.encode(step))
        self.steps.append(step)

    def wait(self, timeout_s: float) -> None:
        return

    def collect(self) -> list[StepOutput]:
        ready, self.submitted = self.submitted[: self.per_collect], self.submitted[self.per_collect :]
        outputs = []
        for message in ready:
            step = msgspec.msgpack.decode(message, type=StepInput)
            groups = [group.execute(batch) for group, batch in zip(self.groups, step.groups, strict=True)]
            outputs.append(StepOutput(step.step_id, groups))
        return outputs

    def take_timings(self) -> list[list[RankTimings]]:
        return []

    def close(self) -> None:
        self.closed = True
