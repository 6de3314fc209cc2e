"""What is asked: one shape per request, from a profile or a trace."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ridgewalk.bench.profiles import Profile
from ridgewalk.config import ConfigError


@dataclass(frozen=True)
class RequestShape:
    """One request: tokens in, tokens out, and when it is sent if a trace says so."""

    input_length: int
    output_length: int
    timestamp_ms: float | None = None

    @property
    def total(self) -> int:
        """Tokens of context that it needs."""
        return self.input_length + self.output_length


def sample_requests(profile: Profile, count: int, seed: int) -> tuple[RequestShape, ...]:
    """``count`` requests of a profile; the same for the same seed."""
    return sample_lengths(profile.prompts, profile.outputs, count, random.Random(f"{profile.name}:{seed}"))


class Lengths(Protocol):
    """A distribution of lengths in tokens."""

    def sample(self, count: int, rng: random.Random) -> list[int]:
        """So many, in random order."""
        ...


def sample_lengths(prompts: Lengths, outputs: Lengths, count: int, rng: random.Random) -> tuple[RequestShape, ...]:
    """``count`` requests whose outputs do not depend on their prompts."""
    pairs = zip(prompts.sample(count, rng), outputs.sample(count, rng), strict=True)
    return tuple(RequestShape(prompt, output) for prompt, output in pairs)


def scaled(requests: Sequence[RequestShape], scale: float) -> tuple[RequestShape, ...]:
    """The same requests with lengths multiplied by ``scale``, at least one token each. Times stay."""
    return tuple(
        replace(
            request,
            input_length=max(1, round(request.input_length * scale)),
            output_length=max(1, round(request.output_length * scale)),
        )
        for request in requests
    )


def check_context(requests: Sequence[RequestShape], max_model_len: int | None, scale: float) -> None:
    """Raises ConfigError when a request (already scaled) cannot fit in the model's context."""
    if max_model_len is None:
        return
    longest = max(requests, key=lambda request: request.total)
    if longest.total <= max_model_len:
        return
    number = requests.index(longest) + 1
    fits = int(1000 * scale * max_model_len / longest.total) / 1000
    raise ConfigError(
        f"--scale: request {number} needs {longest.input_length:,} + {longest.output_length:,} tokens at scale "
        f"{scale:g}, and the model's context holds {max_model_len:,}; try --scale {fits:g}"
    )
