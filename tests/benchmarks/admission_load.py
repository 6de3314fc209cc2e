"""The scarce-KV load: every request sends the same ``max_tokens``; how long it really writes, its rank alone knows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ridgewalk.bench.lengths import LogNormalLengths
from ridgewalk.engine.output_lengths import Array, Integers
from ridgewalk.engine.request import Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.step import StepInput

NUM_REQUESTS = 64
KV_TOKENS = 8192
BLOCK_SIZE = 16
MAX_TOKENS = 4096
STOP_TOKEN = 0
OUTPUTS = LogNormalLengths(median=755, sigma=0.7, longest=MAX_TOKENS - 1)
"""Mean about 965 tokens; with the prompts, 68,000 in all."""


@dataclass(frozen=True)
class HiddenLength:
    """One request of the load."""

    prompt_token_ids: list[int]
    num_output_tokens: int  # stop token included


def make_load(seed: int, vocabulary: int = 16_000, count: int = NUM_REQUESTS) -> list[HiddenLength]:
    """The requests in the order of their arrival, all at once. No prompt holds the stop token or shares a prefix."""
    rng = random.Random(seed)
    prompts = [50 + round(100 * (index + 0.5) / count) for index in range(count)]
    rng.shuffle(prompts)
    return [
        HiddenLength([rng.randrange(1, vocabulary) for _ in range(prompt)], length)
        for prompt, length in zip(prompts, OUTPUTS.sample(count, rng), strict=True)
    ]


def sampling(seed: int) -> SamplingParams:
    """What every request asks."""
    return SamplingParams(max_tokens=MAX_TOKENS, stop_token_ids=(STOP_TOKEN,), temperature=0.0, seed=seed)


def scheduler_config(**changes: object) -> SchedulerConfig:
    """A group with so little KV."""
    fields: dict[str, object] = {
        "num_blocks": KV_TOKENS // BLOCK_SIZE, "block_size": BLOCK_SIZE, "max_model_len": MAX_TOKENS + 160,
        "max_num_seqs": NUM_REQUESTS, "max_num_batched_tokens": 2048,
    }  # fmt: skip
    return SchedulerConfig(**{**fields, **changes})  # type: ignore[arg-type]


class Lengths:
    """What the rank knows, by the prompt (nothing in the engine reads it)."""

    def __init__(self, load: Iterable[HiddenLength]) -> None:
        self._by_prompt = {tuple(each.prompt_token_ids): each.num_output_tokens for each in load}
        self._running: dict[int, tuple[int, int]] = {}  # by sequence: prompt tokens, output tokens

    def follow(self, step: StepInput) -> None:
        """Take up the sequences that a step brings."""
        for batch in step.groups:
            for new in batch.new_sequences:
                prompt = new.token_ids[: new.num_prompt_tokens]
                self._running[new.seq_id] = len(prompt), self._by_prompt[tuple(prompt)]

    def stops(self, step: StepInput) -> list[list[bool]]:
        """By group and row: whether the token that the step samples is the sequence's last."""
        return [
            [
                samples and computed + scheduled - self._running[seq_id][0] + 1 == self._running[seq_id][1]
                for seq_id, computed, scheduled, samples in zip(
                    batch.seq_ids, batch.num_computed_tokens, batch.num_scheduled_tokens, batch.samples, strict=True
                )
            ]
            for batch in step.groups
        ]

    def of(self, request: Request) -> int:
        """Output tokens of a request: for the oracle."""
        return self._by_prompt[tuple(request.token_ids[: request.num_prompt_tokens])]


class Oracle:
    """A `LengthModel` that knows every length."""

    def __init__(self, lengths: Lengths) -> None:
        self._lengths = lengths

    def limits(self, requests: Sequence[Request]) -> list[int]:
        """The lengths themselves."""
        return [self._lengths.of(request) for request in requests]

    def refresh(self, running: Sequence[Request]) -> None:
        """Nothing to learn."""

    def survival(self, requests: Sequence[Request], written: Integers, times: Integers) -> Array:
        """Alive until the limit."""
        return np.ones((len(requests), len(times)))

    def observe(self, request: Request) -> None:
        """Nothing to learn."""
