"""What a request asks of the sampler. Pure data: ranks apply it, the scheduler reads only the limits."""

from __future__ import annotations

import msgspec


class ReasoningBudget(msgspec.Struct, frozen=True, omit_defaults=True):
    """How long a sequence may think: the token that ends its thinking is forced once it has thought so long."""

    max_tokens: int  # of thinking: from the opening tag to the closing one, the tags themselves not counted
    open_token_id: int
    close_token_id: int
    begins_open: bool = False  # the prompt ends with the opening tag: the output begins with thinking


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling of one sequence, in the units of the OpenAI and vLLM APIs.

    ``seed`` is always set: the ingress draws one when the client names none, so that a sequence that is preempted,
    moved or resumed continues with the same draws (randomness is a function of ``(seed, position)`` alone).
    """

    max_tokens: int  # output tokens after which the sequence ends with `length`; counts resumed tokens too
    min_tokens: int = 0  # `stop_token_ids` cannot be sampled before this many output tokens
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # over prompt and output (CTRL, arXiv 1909.05858); 1 is off
    presence_penalty: float = 0.0  # over output only
    frequency_penalty: float = 0.0  # over output only
    seed: int = 0  # 0 <= seed < 2**63
    stop_token_ids: tuple[int, ...] = ()  # end of sequence tokens included, unless the client asked to ignore them
    logprobs: int | None = None  # top alternatives to report per token; 0 reports only the sampled one
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    reasoning: ReasoningBudget | None = None  # None: it may think as long as it writes
    reasoning_effort: str = ""  # low | medium | high as the client put it; its length is predicted by it

    @property
    def is_greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature <= 0.0

    @property
    def changes_logits(self) -> bool:
        """True when logits must be edited before the choice (penalties, bias, or a minimum length)."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.logit_bias)
            or (self.min_tokens > 0 and bool(self.stop_token_ids))
        )
