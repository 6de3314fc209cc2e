"""What can be seen of a request before it writes: requests that look alike are expected to write alike."""

from __future__ import annotations

from typing import NamedTuple

from typing_extensions import Self

from ridgewalk.engine.sampling import SamplingParams


class LengthClass(NamedTuple):
    """What can be seen. Lengths are exponents: of 2, of the prompt of 4."""

    max_tokens: int
    max_reasoning_tokens: int
    effort: str
    prompt_tokens: int

    @classmethod
    def of(cls, sampling: SamplingParams, num_prompt_tokens: int) -> Self:
        """The class of what is asked with a prompt so long."""
        reasoning = sampling.reasoning.max_tokens if sampling.reasoning is not None else 0
        return cls(
            (sampling.max_tokens - 1).bit_length(),
            reasoning.bit_length(),
            sampling.reasoning_effort,
            (num_prompt_tokens.bit_length() + 1) // 2,
        )

    @property
    def lineage(self) -> tuple[tuple[object, ...], ...]:
        """Keys of the classes that hold it, widest first, itself last."""
        return (), self[:1], self[:3], self[:]
