"""Messages between an ingress and an engine replica.

Two roads. The *call* (`GenerateCall` -> `GenerateReply`) is one unary Ray Serve call per HTTP request, open for the
request's life. The *channel* (ZeroMQ) carries the tokens, one `Frame` per engine step and ingress, and the ingress's
control messages. Everything is msgpack; nothing is pickled.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import TokenLogprobs
from ridgewalk.engine.step_meter import StepMeans


class SequenceSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence of a request: a choice of a prompt."""

    index: int  # the choice's number within the HTTP request
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output_token_ids: list[int] = []  # generated before, elsewhere: the sequence continues after them


class GenerateCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything one HTTP request asks of one replica."""

    request_id: str
    ingress_id: str
    sequences: list[SequenceSpec]
    resumed: bool = False  # the client has had tokens already: never refused for a full queue


class SequenceEnd(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a sequence ended: exactly one of these for each sequence."""

    index: int
    finish_reason: str  # stop | length | abort | error
    num_output_tokens: int  # all of them, resumed ones included: the stream is complete only when so many arrived
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when the sequence was first admitted
    stop_token_id: int | None = None  # the token that ended it, when it was one of `stop_token_ids`
    error: str | None = None  # a sentence, with finish_reason == "error"
    status: int = 500  # the HTTP status that suits `error`


class ReplyStatus(str, Enum):
    """What became of a call."""

    DONE = "done"  # every sequence ended; see `sequences`
    MOVED = "moved"  # this is not the replica that was asked for, or it does not hear the ingress: route again
    LOST = "lost"  # the replica failed; `sequences` are those that had ended before
    OVERLOADED = "overloaded"  # the waiting queue is full: 429


class GenerateReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The end of a call."""

    status: ReplyStatus
    sequences: list[SequenceEnd] = []
    retry_after_s: float = 0.0  # with OVERLOADED


class TokenChunk(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sequence in one step."""

    request_id: str
    index: int
    offset: int  # output position of the first of `token_ids`; a gap tells the ingress to ask for a resume
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    end: SequenceEnd | None = None  # these were the last ones


class GroupLoad(msgspec.Struct, frozen=True, array_like=True):
    """State of one attention group's KV cache and queues."""

    total_blocks: int
    used_blocks: int
    cached_blocks: int  # evictable; available = free + cached
    num_running: int
    predicted_peak_blocks: float | None = None  # the most that what runs will use at one time; None: not predicted


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """What the router knows of a replica."""

    groups: list[GroupLoad]
    num_running: int
    num_waiting: int
    num_seats: int  # sequences that may run at once
    steps: StepMeans | None = None  # since the report before; None: none, or this is no report but comes with tokens


class Introduction(msgspec.Struct, frozen=True):
    """Ingress -> replica, a Ray call: who will attach to the channel, and its secret."""

    ingress_id: str
    secret: str
    endpoint: str  # address:port where other ingresses read its metrics


class ChannelAddress(msgspec.Struct, frozen=True):
    """Replica -> ingress: the answer to an `Introduction`."""

    endpoint: str  # tcp://address:port
    epoch: str  # the replica's incarnation: frames of another one are stale
    block_size: int  # tokens of a KV block
    num_ranks: int
    caches_prefixes: bool


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """Ingress -> replica: opens the connection, then every second as a heartbeat.

    The secret was given to the replica in an `Introduction`. Without a word for 3 s the ingress's requests are aborted.
    """

    ingress_id: str
    secret: str


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """Ingress -> replica: end a sequence now. `stop` when the ingress saw a stop string, else `abort`."""

    request_id: str
    index: int  # -1: every sequence of the request
    reason: str  # stop | abort


class Resend(msgspec.Struct, frozen=True, tag="resend"):
    """Ingress -> replica: frames were lost; send the sequence's tokens again from `offset`."""

    request_id: str
    index: int
    offset: int


class MetricsQuery(msgspec.Struct, frozen=True, tag="metrics"):
    """Ingress -> replica: answer with `ReplicaMetrics` in the next frame."""

    number: int  # of the query, given back with the answer


class ReplicaMetrics(msgspec.Struct, frozen=True):
    """What a replica answers when asked for metrics."""

    snapshot: bytes
    ingresses: list[Introduction]  # attached to it now
    number: int = 0  # of the query


class Frame(msgspec.Struct, frozen=True, tag="frame", omit_defaults=True):
    """Replica -> ingress: all that one engine step produced for this ingress, or only the load when idle."""

    epoch: str  # the replica's incarnation
    secret: str  # the ingress's own: a frame without it is not from a replica that the ingress asked
    chunks: list[TokenChunk]
    load: LoadReport
    metrics: ReplicaMetrics | None = None  # the answer to a query


ToReplica = Attach | Finish | Resend | MetricsQuery
