"""One HTTP request's sequences: sent to a replica, followed on its channel, resumed elsewhere if it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec
import ray
from ray.serve.exceptions import RayServeException, RequestCancelledError

from ridgewalk.api.backend import BackendError, Sequence, TokenEvent
from ridgewalk.engine.step import TokenLogprobs
from ridgewalk.replica.protocol import (
    Finish,
    GenerateCall,
    GenerateReply,
    ReplyStatus,
    Resend,
    SequenceEnd,
    SequenceSpec,
    TokenChunk,
)
from ridgewalk.replica.replica_link import ReplicaLink
from ridgewalk.replica.replica_pool import ReplicaPool

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 8
"""Replicas tried before a request is given up."""

NO_REPLICA_TIMEOUT_S = 60.0
"""How long a request waits for a live replica: about what Serve needs to replace one."""

RESEND_EVERY_S = 0.25
"""How long to wait for tokens that a reply announced before asking for them again."""

ABORT_TIMEOUT_S = 5.0
"""How long an aborted call may stay open before it is cancelled through Ray."""


@dataclass
class _SequenceState:
    sequence: Sequence
    token_ids: list[int] = field(default_factory=list)
    end: SequenceEnd | None = None
    resend_asked_at: int | None = None  # the offset asked for, until something arrives

    @property
    def complete(self) -> bool:
        return self.end is not None and len(self.token_ids) >= self.end.num_output_tokens


class RequestStream:
    """Implements `api.backend.TokenStream`."""

    def __init__(self, pool: ReplicaPool, ingress_id: str, request_id: str, sequences: list[Sequence]) -> None:
        self._pool = pool
        self._ingress_id = ingress_id
        self._request_id = request_id
        self._call_id = request_id
        self._states = [_SequenceState(sequence) for sequence in sequences]
        self._events: list[TokenEvent] = []
        self._wake = asyncio.Event()
        self._error: BackendError | None = None
        self._link: ReplicaLink | None = None
        self._closed = False
        self._driver = asyncio.create_task(self._drive())
        self._driver.add_done_callback(self._driver_ended)

    # -- api.backend.TokenStream ------------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        while True:
            if self._events:
                events, self._events = self._events, []
                yield events
                continue
            if self._error is not None:
                raise self._error
            if self._driver.done():
                return
            self._wake.clear()
            await self._wake.wait()

    def finish(self, index: int, reason: str) -> None:
        state = self._states[index]
        if state.end is None and self._link is not None:
            self._link.send(Finish(self._call_id, index, reason))

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._driver.done():
            if self._link is not None:
                self._link.send(Finish(self._call_id, -1, "abort"))
            loop = asyncio.get_running_loop()
            loop.call_later(ABORT_TIMEOUT_S, self._driver.cancel)

    # -- driving ----------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        for attempt in range(MAX_ATTEMPTS):
            if self._closed:
                return
            link = await self._choose_link()
            self._link = link
            self._call_id = f"{self._request_id}.{attempt}"
            link.subscribe(self._call_id, self._on_chunk)
            try:
                reply = await self._call(link)
                if reply is not None and await self._finished(link, reply):
                    return
            finally:
                link.unsubscribe(self._call_id)
            self._pool.drop(link)
            logger.warning("request %s continues on another replica", self._request_id)
        raise BackendError("No replica could finish the request; try again.", 503)

    async def _choose_link(self) -> ReplicaLink:
        link = self._pool.choose(len(self._states))
        while link is None:
            if not await self._pool.wait_ready(NO_REPLICA_TIMEOUT_S):
                raise BackendError("No replica of the model is running; try again later.", 503, 5.0)
            link = self._pool.choose(len(self._states))
        return link

    async def _call(self, link: ReplicaLink) -> GenerateReply | None:
        """The replica's reply, or None when it died."""
        specs = [
            SequenceSpec(index, state.sequence.prompt_token_ids, state.sequence.sampling, state.token_ids[:])
            for index, state in enumerate(self._states)
            if not state.complete
        ]
        call = GenerateCall(self._call_id, self._ingress_id, specs)
        try:
            answer = await link.handle.generate.remote(msgspec.msgpack.encode(call), replica_id=link.replica_id)
        except RequestCancelledError:
            raise asyncio.CancelledError from None
        except (ray.exceptions.RayError, RayServeException) as error:
            logger.warning("replica %s is lost: %s", link.replica_id, type(error).__name__)
            return None
        return msgspec.msgpack.decode(answer, type=GenerateReply)

    async def _finished(self, link: ReplicaLink, reply: GenerateReply) -> bool:
        """True when the reply ended the request; False when it must go to another replica."""
        if reply.status is ReplyStatus.OVERLOADED:
            raise BackendError(
                "Too many requests are waiting for this model; try again later.", 429, reply.retry_after_s
            )
        if reply.status is ReplyStatus.MOVED:
            return False
        for end in reply.sequences:
            if end.error is not None:
                raise BackendError(end.error, end.status)
            self._states[end.index].end = end
        if not self._closed and any(end.finish_reason == "abort" for end in reply.sequences):
            self._forget_ends()  # the replica missed our heartbeats and gave the request up; the client did not
            return False
        return await self._receive_rest(link)

    async def _receive_rest(self, link: ReplicaLink) -> bool:
        """Wait for tokens that the reply overtook; False when the link is lost before they come."""
        for index, state in enumerate(self._states):
            while not state.complete and not self._closed:
                self._wake.clear()
                try:
                    await asyncio.wait_for(self._wake.wait(), RESEND_EVERY_S)
                except asyncio.TimeoutError:
                    if link.closed:
                        self._forget_ends()
                        return False
                    link.send(Resend(self._call_id, index, len(state.token_ids)))
        for index, state in enumerate(self._states):
            end = state.end
            assert end is not None
            reason = end.finish_reason
            self._events.append(TokenEvent(index, [], None, end.num_cached_tokens, reason, end.stop_token_id))
        self._wake.set()
        return True

    def _forget_ends(self) -> None:
        for state in self._states:
            if not state.complete or (state.end is not None and state.end.finish_reason == "abort"):
                state.end = None

    def _on_chunk(self, chunk: TokenChunk) -> None:
        state = self._states[chunk.index]
        have = len(state.token_ids)
        if chunk.offset > have:
            if state.resend_asked_at != have and self._link is not None:
                state.resend_asked_at = have
                self._link.send(Resend(self._call_id, chunk.index, have))
            return
        new = chunk.token_ids[have - chunk.offset :]
        if not new:
            return
        logprobs: list[TokenLogprobs] | None = None
        if chunk.logprobs is not None:
            logprobs = chunk.logprobs[have - chunk.offset :]
        state.token_ids += new
        state.resend_asked_at = None
        self._events.append(TokenEvent(chunk.index, new, logprobs, chunk.num_cached_tokens))
        self._wake.set()

    def _driver_ended(self, driver: asyncio.Task[None]) -> None:
        if not driver.cancelled() and (error := driver.exception()) is not None:
            if isinstance(error, BackendError):
                self._error = error
            else:
                logger.error("request %s failed", self._request_id, exc_info=error)
                self._error = BackendError("The request failed inside the service.", 500)
        self._wake.set()
