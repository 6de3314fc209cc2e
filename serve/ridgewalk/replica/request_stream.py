"""One HTTP request's sequences: sent to a replica, followed on its channel, resumed elsewhere if it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import ray
from ray.serve.exceptions import RayServeException

from ridgewalk.api.backend import BackendError, Sequence, TokenEvent
from ridgewalk.replica.open_call import OpenCall
from ridgewalk.replica.protocol import Finish, GenerateReply, ReplyStatus, Resend, SequenceEnd, SequenceSpec, TokenChunk
from ridgewalk.replica.replica_link import ReplicaLink
from ridgewalk.replica.replica_pool import ReplicaPool
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.prefix_index import prefix_hashes

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
"""Replicas that may fail under a request before it is given up: it may be the request that breaks them."""

MAX_ATTEMPTS = 100
"""Calls of one request in all; each that finds its replica gone costs a moment's wait."""

AVOID_MOVED_S, AVOID_LOST_S = 0.5, 5.0
"""How long nothing new is sent to a replica that was not there, or that failed."""

NEW_TIMEOUT_S, RESUMED_TIMEOUT_S = 60.0, 600.0
"""How long a request waits for a live replica: a fresh one, and one whose client has had tokens."""

RESEND_EVERY_S = 0.25
"""How long to wait for missing tokens before asking for them again."""


@dataclass
class _SequenceState:
    sequence: Sequence
    token_ids: list[int] = field(default_factory=list)
    end: SequenceEnd | None = None
    stopped: bool = False  # this side has all it wants
    told: bool = False  # the reader has had the last event
    resend_asked_at: float = 0.0
    prefix: tuple[int, ...] = ()  # hashes of the prompt
    routed: OpenSequence | None = None  # while a replica works on it

    @property
    def new(self) -> NewSequence:
        """As the router sees it."""
        sequence = self.sequence
        prompt_length = len(sequence.prompt_token_ids)
        return NewSequence.of(sequence.sampling, prompt_length, len(self.token_ids), self.prefix, sequence.slo)

    @property
    def settled(self) -> bool:
        """True when the replica has nothing more to do for it."""
        return self.stopped or self.end is not None

    @property
    def complete(self) -> bool:
        return self.stopped or (self.end is not None and len(self.token_ids) >= self.end.num_output_tokens)


class RequestStream:
    """Implements `api.backend.TokenStream` and `replica_link.Subscriber`."""

    def __init__(self, pool: ReplicaPool, ingress_id: str, request_id: str, sequences: list[Sequence]) -> None:
        self._pool = pool
        self._ingress_id = ingress_id
        self._request_id = request_id
        self._states = [
            _SequenceState(sequence, prefix=prefix_hashes(sequence.prompt_token_ids)) for sequence in sequences
        ]
        self._events: list[TokenEvent] = []
        self._has_events = asyncio.Event()  # for the reader
        self._changed = asyncio.Event()  # for the driver
        self._error: BackendError | None = None
        self._finished = False  # the driver has nothing more to say
        self._closed = False
        self._call: OpenCall | None = None
        self._event_loop = asyncio.get_running_loop()
        self._driver = asyncio.create_task(self._run())

    # -- api.backend.TokenStream ------------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        while True:
            if self._events:
                events, self._events = self._events, []
                yield events
            elif self._error is not None:
                raise self._error
            elif self._finished:
                return
            else:
                self._has_events.clear()
                await self._has_events.wait()

    def finish(self, index: int, reason: str) -> None:
        state = self._states[index]
        if state.complete:
            return
        state.stopped = True
        self._note_end(state, reason == "stop")
        if self._call is not None:
            self._call.link.send(Finish(self._call.call_id, index, reason))
        self._tell_end(index, reason, None)
        self._changed.set()

    async def aclose(self) -> None:
        self._closed = True
        self._changed.set()

    # -- replica_link.Subscriber ------------------------------------------------------------------------------------

    def on_chunk(self, chunk: TokenChunk) -> None:
        state = self._states[chunk.index]
        have = len(state.token_ids)
        if state.stopped:
            return
        if chunk.offset > have:
            self._ask_again(chunk.index)
            return
        if chunk.end is not None:
            state.end = chunk.end
        new = chunk.token_ids[have - chunk.offset :]
        if new:
            logprobs = None if chunk.logprobs is None else chunk.logprobs[have - chunk.offset :]
            state.token_ids += new
            if state.routed is not None:
                state.routed.on_tokens(len(state.token_ids), self._event_loop.time())
            self._tell(TokenEvent(chunk.index, new, logprobs, chunk.num_cached_tokens))
        self._settle(chunk.index)

    def on_link_lost(self) -> None:
        self._changed.set()

    # -- driving ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._drive()
        except BackendError as error:
            self._error = error
        except Exception:
            logger.exception("request %s failed", self._request_id)
            self._error = BackendError("The request failed inside the service.", 500)
        finally:
            self._finished = True
            self._has_events.set()

    async def _drive(self) -> None:
        losses = 0
        refusals: dict[str, float] = {}  # seconds to wait, by replica whose queue is full
        for attempt in range(MAX_ATTEMPTS):
            if self._closed or self._complete:
                return
            link = await self._choose_link(refusals)
            if self._closed:
                return
            reply = await self._attempt(link, f"{self._request_id}.{attempt}")
            if self._closed or self._complete:
                return
            if reply is not None and reply.status is ReplyStatus.OVERLOADED:
                refusals[link.replica_id] = reply.retry_after_s
            elif reply is not None and reply.status is ReplyStatus.MOVED:
                link.avoid(AVOID_MOVED_S)
            else:
                losses += 1
                if losses >= MAX_LOSSES:
                    break
                link.avoid(AVOID_LOST_S)
                logger.warning("request %s lost replica %s and continues", self._request_id, link.replica_id)
        raise BackendError(f"The request was lost {losses} times with its replica and is given up.", 500)

    async def _choose_link(self, refusals: dict[str, float]) -> ReplicaLink:
        request = [state.new for state in self._states if not state.complete]
        while (link := self._pool.choose(request, refusals)) is None:
            if refusals:
                raise BackendError(
                    "Too many requests are waiting for this model; try again later.", 429, min(refusals.values())
                )
            timeout_s = RESUMED_TIMEOUT_S if self._resumed else NEW_TIMEOUT_S
            if not await self._pool.wait_ready(timeout_s):
                raise BackendError("No replica of the model is running; try again later.", 503, 5.0)
        return link

    async def _attempt(self, link: ReplicaLink, call_id: str) -> GenerateReply | None:
        """One call: until all is complete, the reader has gone, the replica says no more, or it is lost (None)."""
        specs = [
            SequenceSpec(index, state.sequence.prompt_token_ids, state.sequence.sampling, state.token_ids[:])
            for index, state in enumerate(self._states)
            if not state.complete
        ]
        call = self._call = OpenCall(link, call_id, self._ingress_id, specs, self._resumed, self._changed.set)
        for spec in specs:
            self._states[spec.index].routed = self._pool.on_sent(self._states[spec.index].new, link)
        link.subscribe(call_id, self, len(specs))
        try:
            reply: GenerateReply | None = None
            while not (self._complete or self._closed):
                self._changed.clear()
                if reply is None and call.done:
                    reply = self._take_reply(call)
                    if reply is None or reply.status is not ReplyStatus.DONE:
                        return reply
                elif link.closed:
                    return None
                else:
                    await self._wait(RESEND_EVERY_S if reply is not None else None)
            return reply
        finally:
            self._call = None
            link.unsubscribe(call_id)
            for state in self._states:
                self._note_end(state, False)
            call.release(abort=not all(self._states[spec.index].settled for spec in specs))
            self._forget_incomplete_ends()

    def _take_reply(self, call: OpenCall) -> GenerateReply | None:
        """The reply, its ends noted; None when the replica is lost."""
        try:
            reply = call.reply()
        except (ray.exceptions.RayError, RayServeException) as error:
            logger.warning("replica %s is lost: %s", call.link.replica_id, type(error).__name__)
            return None
        for end in reply.sequences:
            if end.error is not None:
                raise BackendError(end.error, end.status)
            if end.finish_reason == "abort" and not self._closed and not self._states[end.index].stopped:
                return GenerateReply(ReplyStatus.MOVED)  # it missed our heartbeats; the client is still there
            self._states[end.index].end = end
            self._settle(end.index)
        return reply

    async def _wait(self, timeout_s: float | None) -> None:
        """Until something changes; after ``timeout_s`` ask again for what is missing."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except asyncio.TimeoutError:
            for index, state in enumerate(self._states):
                if not state.complete:
                    self._ask_again(index)

    # -- sequences --------------------------------------------------------------------------------------------------

    @property
    def _complete(self) -> bool:
        return all(state.complete for state in self._states)

    @property
    def _resumed(self) -> bool:
        return any(state.token_ids for state in self._states)

    def _ask_again(self, index: int) -> None:
        state, now = self._states[index], self._event_loop.time()
        if self._call is not None and now - state.resend_asked_at >= RESEND_EVERY_S:
            state.resend_asked_at = now
            self._call.link.send(Resend(self._call.call_id, index, len(state.token_ids)))

    def _settle(self, index: int) -> None:
        """Tell the reader that a sequence is complete, once."""
        state = self._states[index]
        if state.end is not None and state.end.finish_reason != "abort" and state.complete and not state.told:
            self._note_end(state, state.end.finish_reason == "stop")
            self._tell_end(index, state.end.finish_reason, state.end)
            self._changed.set()

    def _note_end(self, state: _SequenceState, stopped: bool) -> None:
        """Tell the router that a replica is done with a sequence, once."""
        routed, state.routed = state.routed, None
        if routed is not None:
            self._pool.on_ended(routed, stopped)

    def _tell_end(self, index: int, reason: str, end: SequenceEnd | None) -> None:
        self._states[index].told = True
        cached, token = (end.num_cached_tokens, end.stop_token_id) if end is not None else (0, None)
        self._tell(TokenEvent(index, [], None, cached, reason, token))

    def _tell(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._has_events.set()

    def _forget_incomplete_ends(self) -> None:
        """Another replica will produce the tokens that are missing, and its own end."""
        for state in self._states:
            if not state.told:
                state.end = None
            state.resend_asked_at = 0.0
