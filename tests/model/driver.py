"""Drives runners with hand-made steps: block bookkeeping and batching as a scheduler would do them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import NO_TOKEN, PLACEHOLDER_TOKEN, GroupBatch, NewSequence, StepInput, StepOutput
from ridgewalk.model.runner import ModelRunner, create_runner
from ridgewalk.model.runner_config import RunnerConfig

GREEDY = SamplingParams(max_tokens=10_000, temperature=0.0)
BLOCK_SIZE = 4


@dataclass
class Sequence:
    """One request in the driver's hands."""

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams = GREEDY
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    on_ranks: bool = False
    unsent: list[int] = field(default_factory=list)  # tokens the ranks were not told yet
    logprobs: list = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


class Driver:
    """Plans steps for a group of runners that act as one replica."""

    def __init__(self, execute: Callable[[StepInput], StepOutput], num_blocks: int, placeholders: bool = False) -> None:
        self.execute = execute
        self.free = list(range(num_blocks))[::-1]
        self.placeholders = placeholders
        self.dropped: list[int] = []
        self.step_id = 0
        self.measure = False

    def step(self, sequences: list[Sequence], chunk: int = 10_000) -> None:
        """One step: each sequence computes up to ``chunk`` of its tokens and samples when it reaches the last."""
        columns: list[tuple] = []
        created = []
        for sequence in sequences:
            count = min(chunk, len(sequence.token_ids) - sequence.num_computed)
            needed = -(-(sequence.num_computed + count) // BLOCK_SIZE) - len(sequence.blocks)
            if sequence.on_ranks:
                fresh = [self.free.pop() for _ in range(max(needed, 0))]
                sequence.blocks += fresh
            else:
                sequence.blocks += [self.free.pop() for _ in range(max(needed, 0))]
                fresh = list(sequence.blocks)
                created.append(
                    NewSequence(
                        sequence.seq_id, list(sequence.token_ids), sequence.num_prompt_tokens, sequence.sampling
                    )
                )
                sequence.on_ranks, sequence.unsent = True, []
            last = sequence.unsent.pop() if sequence.unsent else NO_TOKEN
            if last != NO_TOKEN and self.placeholders:
                last = PLACEHOLDER_TOKEN
            samples = sequence.num_computed + count == len(sequence.token_ids)
            columns.append((sequence.seq_id, sequence.num_computed, count, fresh, last, samples))
        lists = [list(column) for column in zip(*columns, strict=True)] if columns else [[] for _ in range(6)]
        batch = GroupBatch(*lists, created, self.dropped)
        self.dropped = []
        output = self.execute(StepInput(self.step_id, [batch], self.measure))
        assert output.step_id == self.step_id
        self.step_id += 1
        group = output.groups[0]
        for index, (sequence, (_, _, count, _, _, samples)) in enumerate(zip(sequences, columns, strict=True)):
            sequence.num_computed += count
            assert (group.token_ids[index] == NO_TOKEN) == (not samples)
            if samples:
                sequence.token_ids.append(group.token_ids[index])
                sequence.unsent = [group.token_ids[index]]
                if group.logprobs is not None:
                    sequence.logprobs.append(group.logprobs[index])

    def drop(self, sequence: Sequence) -> None:
        """Preempt or finish: the blocks are free again, the ranks forget the sequence in the next step."""
        self.free += sequence.blocks[::-1]
        sequence.blocks, sequence.num_computed, sequence.on_ranks = [], 0, False
        self.dropped.append(sequence.seq_id)

    def generate(
        self, prompt: list[int], count: int, sampling: SamplingParams = GREEDY, chunk: int = 10_000
    ) -> Sequence:
        """Run one request alone to ``count`` tokens; its blocks stay taken."""
        sequence = Sequence(1_000_000 + self.step_id, list(prompt), len(prompt), sampling)
        while len(sequence.output) < count:
            self.step([sequence], chunk)
        return sequence


class RunnerGroup:
    """The tensor-parallel ranks of one replica as threads of this process."""

    def __init__(self, config: RunnerConfig, num_blocks: int) -> None:
        self.runners: list[ModelRunner] = [None] * config.tp  # type: ignore[list-item]

        def start(rank: int) -> None:
            runner = create_runner(RunnerConfig(**{**_fields(config), "rank": rank}))
            runner.load()
            runner.allocate(num_blocks)
            self.runners[rank] = runner

        _in_threads(config.tp, start)

    def execute(self, step: StepInput) -> StepOutput:
        outputs: list[StepOutput | None] = [None] * len(self.runners)

        def run(rank: int) -> None:
            outputs[rank] = self.runners[rank].execute(step)

        _in_threads(len(self.runners), run)
        assert outputs[0] is not None
        assert all(output is None for output in outputs[1:])
        return outputs[0]

    def close(self) -> None:
        for runner in self.runners:
            runner.close()


def make_config(folder: Path, tp: int = 1, init: Path | None = None, **changes: object) -> RunnerConfig:
    """A small FP32 CPU runner."""
    fields = {
        "model": str(folder),
        "dtype": "float32",
        "device": "cpu",
        "rank": 0,
        "tp": tp,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 4,
        "max_model_len": 200,
        "num_threads": 1,
        "init_method": f"file://{init}" if init else "",
        "timeout_s": 30.0,
    }
    return RunnerConfig(**{**fields, **changes})


def _fields(config: RunnerConfig) -> dict:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)

    if count == 1:
        work(0)
        return
    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
