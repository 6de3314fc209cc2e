"""Ranks without a model: they check the contract of `StepInput` and "sample" a known function of the tokens."""

from __future__ import annotations

import zlib
from collections import deque

import msgspec

from ridgewalk.engine.step import (
    NO_TOKEN,
    PLACEHOLDER_TOKEN,
    BlockCopy,
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
        self.host: dict[tuple[int, int], tuple[int, ...]] = {}

    def execute(self, batch: GroupBatch) -> GroupOutput:
        for copy in batch.copies:
            self._copy(copy)
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

    def _copy(self, copy: BlockCopy) -> None:
        for offset in range(self.block_size):
            if copy.to_host:
                self.host[copy.host_block, offset] = self.slots[copy.block, offset]
            else:
                self.slots[copy.block, offset] = self.host[copy.host_block, offset]

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


class FakeStage:
    """One pipeline stage of every group: its own KV, and a queue of steps that it computes in order."""

    def __init__(self, block_size: int, num_groups: int) -> None:
        self.groups = [FakeGroup(block_size) for _ in range(num_groups)]
        self.queue: deque[bytes] = deque()

    def compute(self) -> StepOutput:
        step = msgspec.msgpack.decode(self.queue.popleft(), type=StepInput)
        groups = [group.execute(batch) for group, batch in zip(self.groups, step.groups, strict=True)]
        return StepOutput(step.step_id, groups)


class FakeExecutor:
    """Runs steps when they are collected, at most ``per_collect`` at a time, over the real wire format.

    In a pipeline a step moves on by one stage, at most, each time that outputs are collected.
    """

    def __init__(self, block_size: int, num_groups: int = 1, per_collect: int = 1, num_stages: int = 1) -> None:
        self.stages = [FakeStage(block_size, num_groups) for _ in range(num_stages)]
        self.num_groups = num_groups
        self.per_collect = per_collect
        self.submitted = self.stages[0].queue
        self.steps: list[StepInput] = []
        self.in_flight: deque[set[int]] = deque()  # those that sample, of each step that has not come out yet
        self.closed = False

    def submit(self, step: StepInput) -> None:
        assert len(step.groups) == self.num_groups
        assert step.others_in_flight == bool(self.in_flight)
        sequences = {seq_id for batch in step.groups for seq_id in batch.seq_ids}
        if len(self.stages) > 1:
            assert not any(sequences & others for others in self.in_flight), (
                "a sequence runs on before it has its token"
            )
            assert not any(PLACEHOLDER_TOKEN in batch.last_token_ids for batch in step.groups)
        self.in_flight.append(
            {
                seq_id
                for batch in step.groups
                for seq_id, samples in zip(batch.seq_ids, batch.samples, strict=True)
                if samples
            }
        )
        self.submitted.append(msgspec.msgpack.encode(step))
        self.steps.append(step)

    def wait(self, timeout_s: float) -> None:
        return

    def collect(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        for stage, following in zip(reversed(self.stages), [None, *reversed(self.stages[1:])], strict=True):
            for message in list(stage.queue)[: self.per_collect]:
                output = stage.compute()
                if following is None:
                    self.in_flight.popleft()
                    outputs.append(output)
                else:
                    following.queue.append(message)
        return outputs

    def take_timings(self) -> list[list[RankTimings]]:
        return []

    def close(self) -> None:
        self.closed = True
