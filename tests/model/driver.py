"""Drives runners with hand-made steps: block bookkeeping and batching as a scheduler would do them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import (
    NO_TOKEN,
    PLACEHOLDER_TOKEN,
    GroupBatch,
    GroupOutput,
    NewSequence,
    StepInput,
    StepOutput,
)
from ridgewalk.model.runner import ModelRunner, create_runner
from ridgewalk.model.runner_config import RunnerConfig
from ridgewalk.parallel.communicator import CommunicationError

GREEDY = SamplingParams(max_tokens=10_000, temperature=0.0)
BLOCK_SIZE = 4
GENERATED = 1_000_000
"""`Driver.generate` numbers its sequences from here."""


@dataclass
class Sequence:
    """One request in the driver's hands."""

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams = GREEDY
    group: int = 0
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    on_ranks: bool = False
    unsent: list[int] = field(default_factory=list)  # tokens the ranks were not told yet
    logprobs: list = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(frozen=True)
class Row:
    """A sequence's part in a step."""

    sequence: Sequence
    num_computed: int
    count: int
    fresh: list[int]
    last: int
    samples: bool


@dataclass(frozen=True)
class OpenStep:
    """A step that the runners were given."""

    step_id: int
    groups: list[list[Row]]
    results: list[Future]


class RunnerGroup:
    """The ranks of one replica, each a thread of this process."""

    def __init__(self, config: RunnerConfig, num_blocks: int) -> None:
        self.config = config
        self._threads = [ThreadPoolExecutor(1, f"rank{rank}") for rank in range(config.mesh.world_size)]

        def start(rank: int) -> ModelRunner:
            runner = create_runner(msgspec.structs.replace(config, rank=rank))
            runner.load()
            runner.allocate(num_blocks)
            return runner

        self.runners: list[ModelRunner] = []
        try:
            self.runners = _results([thread.submit(start, rank) for rank, thread in enumerate(self._threads)])
        finally:
            if not self.runners:
                self.close()

    def submit(self, step: StepInput) -> list[Future]:
        """Hand a step to every rank; `collect` waits for it."""
        return [thread.submit(runner.execute, step) for thread, runner in zip(self._threads, self.runners, strict=True)]

    def collect(self, step_id: int, results: list[Future]) -> StepOutput:
        """The step's output, from the first rank of the last stage of every attention group; no other has any."""
        groups: dict[int, GroupOutput] = {}
        for rank, output in enumerate(_results(results)):
            dp, pp, tp = self.config.mesh.coordinates(rank)
            speaks = tp == 0 and pp == self.config.pp - 1
            assert (output is not None) == speaks
            if speaks:
                groups[dp] = output
        return StepOutput(step_id, [groups[group] for group in range(self.config.dp)])

    def execute(self, step: StepInput) -> StepOutput:
        return self.collect(step.step_id, self.submit(step))

    def on_every_rank(self, method: str) -> None:
        """Call a method of every runner."""
        _results([t.submit(getattr(r, method)) for t, r in zip(self._threads, self.runners, strict=True)])

    def close(self) -> None:
        for runner in self.runners:
            runner.close()
        for thread in self._threads:
            thread.shutdown()


class Driver:
    """Plans steps for a group of runners that act as one replica; every attention group has blocks of its own."""

    def __init__(self, ranks: RunnerGroup, num_blocks: int, placeholders: bool = False) -> None:
        self.ranks = ranks
        self.free = [list(range(num_blocks))[::-1] for _ in range(ranks.config.dp)]
        self.placeholders = placeholders
        self.dropped: list[list[int]] = [[] for _ in self.free]
        self.step_id = 0
        self.num_open = 0
        self.measure = False

    def step(self, sequences: list[Sequence], chunk: int = 10_000) -> None:
        """One step: each sequence computes up to ``chunk`` of its tokens and samples when it reaches the last."""
        self.end(self.begin(sequences, chunk))

    def begin(self, sequences: list[Sequence], chunk: int = 10_000) -> OpenStep:
        """Hand a step to the ranks. None of its sequences may be in another open step."""
        batches, groups = [], []
        for group in range(len(self.free)):
            created: list[NewSequence] = []
            rows = [self._plan(sequence, chunk, created) for sequence in sequences if sequence.group == group]
            columns = [[getattr(row, name) for row in rows] for name in ("num_computed", "count", "fresh", "last")]
            ids, samples = [row.sequence.seq_id for row in rows], [row.samples for row in rows]
            batches.append(GroupBatch(ids, *columns, samples, created, self.dropped[group]))
            groups.append(rows)
        self.dropped = [[] for _ in self.free]
        step = StepInput(self.step_id, batches, self.measure, others_in_flight=self.num_open > 0)
        self.step_id += 1
        self.num_open += 1
        return OpenStep(step.step_id, groups, self.ranks.submit(step))

    def end(self, step: OpenStep) -> None:
        """Wait for a step and take its tokens in."""
        output = self.ranks.collect(step.step_id, step.results)
        self.num_open -= 1
        for rows, group in zip(step.groups, output.groups, strict=True):
            assert len(rows) == len(group.token_ids)
            for index, row in enumerate(rows):
                token = group.token_ids[index]
                assert (token == NO_TOKEN) == (not row.samples)
                row.sequence.num_computed += row.count
                if row.samples:
                    row.sequence.token_ids.append(token)
                    row.sequence.unsent = [token]
                    if group.logprobs is not None:
                        row.sequence.logprobs.append(group.logprobs[index])

    def drop(self, sequence: Sequence) -> None:
        """Preempt or finish: the blocks are free again, the ranks forget the sequence in the next step."""
        self.free[sequence.group] += sequence.blocks[::-1]
        sequence.blocks, sequence.num_computed, sequence.on_ranks = [], 0, False
        self.dropped[sequence.group].append(sequence.seq_id)

    def generate(
        self, prompt: list[int], count: int, sampling: SamplingParams = GREEDY, chunk: int = 10_000, group: int = 0
    ) -> Sequence:
        """Run one request alone to ``count`` tokens; its blocks stay taken."""
        sequence = Sequence(GENERATED + self.step_id, list(prompt), len(prompt), sampling, group)
        while len(sequence.output) < count:
            self.step([sequence], chunk)
        return sequence

    def _plan(self, sequence: Sequence, chunk: int, created: list[NewSequence]) -> Row:
        count = min(chunk, len(sequence.token_ids) - sequence.num_computed)
        needed = -(-(sequence.num_computed + count) // BLOCK_SIZE) - len(sequence.blocks)
        fresh = [self.free[sequence.group].pop() for _ in range(max(needed, 0))]
        sequence.blocks += fresh
        if not sequence.on_ranks:
            fresh = list(sequence.blocks)
            known = list(sequence.token_ids)
            created.append(NewSequence(sequence.seq_id, known, sequence.num_prompt_tokens, sequence.sampling))
            sequence.on_ranks, sequence.unsent = True, []
        last = sequence.unsent.pop() if sequence.unsent else NO_TOKEN
        if last != NO_TOKEN and self.placeholders:
            last = PLACEHOLDER_TOKEN
        samples = sequence.num_computed + count == len(sequence.token_ids)
        return Row(sequence, sequence.num_computed, count, fresh, last, samples)


def make_config(folder: Path, tp: int = 1, init: Path | None = None, **changes: object) -> RunnerConfig:
    """A small FP32 CPU runner; ``changes`` may hold the other axes of the mesh."""
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


def _results(futures: list[Future]) -> list:
    """What every rank returned. Of several errors the one that is not merely a peer's leaving."""
    wait(futures)
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, CommunicationError)), errors[0])
    return [future.result() for future in futures]
