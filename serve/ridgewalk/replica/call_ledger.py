"""The calls of one replica: which sequences each has, what they have produced, and when a call is complete."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field

from ridgewalk.engine.request import Request
from ridgewalk.engine.step import TokenLogprobs
from ridgewalk.replica.protocol import GenerateCall, GenerateReply, ReplyStatus, SequenceEnd, TokenChunk

KEEP_ENDED_S = 30.0
"""Tokens of an ended call stay so long for an ingress that lost frames, and aborts of calls not seen yet."""


@dataclass
class CallRecord:
    """One call, from its arrival until it is forgotten."""

    call: GenerateCall
    requests: dict[int, Request] = field(default_factory=dict)  # by index
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # by index, when asked for
    first_offset: dict[int, int] = field(default_factory=dict)  # output tokens that came with the call
    ends: dict[int, SequenceEnd] = field(default_factory=dict)
    ended_at: float | None = None

    @property
    def reply(self) -> GenerateReply | None:
        """The answer, once every sequence has ended."""
        if len(self.ends) < len(self.call.sequences):
            return None
        return GenerateReply(ReplyStatus.DONE, [self.ends[spec.index] for spec in self.call.sequences])


class CallLedger:
    """Calls by request id."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, CallRecord] = OrderedDict()
        self._aborted_early: dict[str, float] = {}  # when, by request id
        self._by_ingress: defaultdict[str, set[str]] = defaultdict(set)  # unended ones

    def open(self, call: GenerateCall) -> CallRecord:
        """Start a record; one with the same id that has ended is replaced."""
        record = CallRecord(call)
        self._records[call.request_id] = record
        self._records.move_to_end(call.request_id)
        self._by_ingress[call.ingress_id].add(call.request_id)
        return record

    def get(self, request_id: str) -> CallRecord | None:
        """The record, also for a while after its end."""
        return self._records.get(request_id)

    def abort_early(self, request_id: str, now: float) -> None:
        """An abort came before its call: the channel is faster than Ray."""
        self._aborted_early[request_id] = now

    def was_aborted(self, request_id: str) -> bool:
        """True for a call that must not start any more."""
        return request_id in self._aborted_early

    def is_open(self, request_id: str) -> bool:
        """True for a call that has not ended."""
        record = self._records.get(request_id)
        return record is not None and record.ended_at is None

    def open_calls(self, ingress_id: str) -> list[CallRecord]:
        """Calls of an ingress that have not ended."""
        return [self._records[request_id] for request_id in self._by_ingress.get(ingress_id, ())]

    def ends_so_far(self, request_id: str) -> list[SequenceEnd]:
        """Of a call, the sequences that have ended."""
        return list(self._records[request_id].ends.values())

    def end_sequence(self, record: CallRecord, end: SequenceEnd, now: float) -> GenerateReply | None:
        """Note a sequence's end; the call's reply if it was the last one. A second end is ignored."""
        if end.index in record.ends:
            return None
        record.ends[end.index] = end
        reply = record.reply
        if reply is not None:
            record.ended_at = now
            self._by_ingress[record.call.ingress_id].discard(record.call.request_id)
        return reply

    def chunk_from(self, record: CallRecord, index: int, offset: int) -> TokenChunk | None:
        """Everything a sequence has produced from ``offset`` on, or None when there is nothing."""
        request = record.requests.get(index)
        end = record.ends.get(index)
        if request is None or offset < record.first_offset[index]:
            return None
        if offset >= request.num_output_tokens and end is None:
            return None
        logprobs = record.logprobs.get(index)
        return TokenChunk(
            record.call.request_id,
            index,
            offset,
            request.output_token_ids[offset:],
            None if logprobs is None else logprobs[offset - record.first_offset[index] :],
            request.num_cached_tokens,
            end,
        )

    def forget_old(self, now: float) -> None:
        """Drop calls that ended `KEEP_ENDED_S` ago."""
        for request_id, record in list(self._records.items()):
            if record.ended_at is not None and now - record.ended_at > KEEP_ENDED_S:
                del self._records[request_id]
        for request_id, aborted_at in list(self._aborted_early.items()):
            if now - aborted_at > KEEP_ENDED_S:
                del self._aborted_early[request_id]
        for ingress_id in [key for key, names in self._by_ingress.items() if not names]:
            del self._by_ingress[ingress_id]
