"""The whole contract between scheduling and computing: one `StepInput` out, one `StepOutput` back.

Both are msgpack messages (``array_like``: fields are positional on the wire, so only append). A *group* is an attention
group: one in-replica data-parallel index, i.e. the ranks that share one KV cache. All lists of a `GroupBatch` that are
not marked otherwise run parallel to ``seq_ids``.
"""

from __future__ import annotations

import msgspec

from ridgewalk.engine.sampling import SamplingParams

NO_TOKEN = -1
"""In `GroupBatch.last_token_ids`: the rank already knows every token that this step reads."""

PLACEHOLDER_TOKEN = -2
"""In `GroupBatch.last_token_ids`: an earlier step in flight is still sampling the token; the ranks fill it in."""


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that the ranks do not hold: new, resumed, or preempted and scheduled again."""

    seq_id: int
    token_ids: list[int]  # every token known so far: the prompt, then tokens already generated
    num_prompt_tokens: int  # the first so many of `token_ids` are prompt (penalties and min_tokens count the others)
    sampling: SamplingParams


class BlockCopy(msgspec.Struct, frozen=True, array_like=True):
    """KV of one block, of all layers, to or from the host."""

    to_host: bool
    block: int  # of the KV cache
    host_block: int  # of the swap space


class GroupBatch(msgspec.Struct, frozen=True, array_like=True):
    """What one attention group computes in one step. An idle group gets an empty batch, never none."""

    seq_ids: list[int]  # the sequences of this step, in the order of their rows
    num_computed_tokens: list[int]  # tokens whose KV is in the cache before this step
    num_scheduled_tokens: list[int]  # tokens computed by this step: positions computed .. computed + scheduled - 1
    new_block_ids: list[list[int]]  # appended to the sequence's block table before the step (never rewritten)
    last_token_ids: list[int]  # appended to the sequence's tokens before the step; NO_TOKEN or PLACEHOLDER_TOKEN
    samples: list[bool]  # True: sample a token from the last position computed
    new_sequences: list[NewSequence]  # not parallel: those of `seq_ids` that ranks must first create
    dropped_seq_ids: list[int]  # not parallel: finished or preempted; ranks forget them before anything else
    copies: list[BlockCopy] = []  # not parallel: made in this order, before anything is computed

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this group in this step."""
        return sum(self.num_scheduled_tokens)


class StepInput(msgspec.Struct, frozen=True, array_like=True):
    """One step of a replica, the same message for every rank."""

    step_id: int
    groups: list[GroupBatch]
    measure: bool = False  # ranks time their collectives and phases in this step and report them
    others_in_flight: bool = False  # other steps were open when this one was scheduled

    @property
    def num_tokens(self) -> int:
        """Tokens computed by all groups in this step."""
        return sum(group.num_tokens for group in self.groups)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural log, after penalties and bias, before temperature and truncation) at one position."""

    logprob: float  # of the sampled token
    rank: int  # 1-based rank of the sampled token
    top: list[tuple[int, float]]  # (token id, logprob), best first; as many as asked for


class GroupOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one attention group sampled; runs parallel to its `GroupBatch.seq_ids`."""

    token_ids: list[int]  # NO_TOKEN where the row did not sample
    logprobs: list[TokenLogprobs | None] | None = None  # None when no row asked


class StepOutput(msgspec.Struct, frozen=True, array_like=True):
    """The result of one step: what every attention group sampled, each sent by its first rank of the last stage."""

    step_id: int
    groups: list[GroupOutput]


class CollectiveTiming(msgspec.Struct, frozen=True, array_like=True):
    """One collective call on one rank in a measured step."""

    op: str  # all_reduce | all_gather | gather | dispatch | combine | send | recv | broadcast
    seconds: float  # from entering the call to leaving it: waiting for peers included
    num_bytes: int  # payload of this rank
    group: str = "tp"  # the process group it ran over: tp | ep | pp


class RankTimings(msgspec.Struct, frozen=True, array_like=True):
    """What one rank measured in one step with `StepInput.measure`."""

    step_id: int
    rank: int
    seconds: float  # the whole step on this rank, from receiving its input to having its output
    phases: dict[str, float]  # seconds by phase: prepare, embed, attention, mlp, collective, head, sample ...
    collectives: list[CollectiveTiming]  # in the order of the calls, the same order on every rank of a group
    bubble_seconds: float = 0.0  # waiting for the previous pipeline stage, since the last report of this rank
    expert_tokens: list[list[int]] = []  # of this step: rows computed here, by sparse layer of the stage, by slot
    routed_tokens: int = 0  # rows that left this rank in dispatch, since its last report
    routed_bytes: int = 0  # and their bytes
