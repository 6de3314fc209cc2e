"""Sends a generation to its client, as a stream or in one piece."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ridgewalk.api import sse
from ridgewalk.api.backend import BackendError
from ridgewalk.api.disconnect import run_until_disconnect
from ridgewalk.api.errors import CLIENT_CLOSED_REQUEST, ApiError, ClientDisconnected
from ridgewalk.api.generation import Generation
from ridgewalk.api.open_replies import OpenReplies
from ridgewalk.api.output import OutputDelta

logger = logging.getLogger(__name__)


class ReplyWriter(Protocol):
    """The objects of one endpoint, as JSON."""

    def opening(self) -> bytes:
        """The first events of a stream."""

    def event(self, delta: OutputDelta) -> bytes:
        """The events for a delta, possibly none."""

    def closing(self) -> bytes:
        """The last events of a stream."""

    def whole(self, deltas: list[list[OutputDelta]]) -> bytes:
        """The answer in one piece, of the deltas of each choice."""


def _server_ends() -> BackendError:
    return BackendError("The server ends; what it has not answered yet must be asked again.", status=503)


class GenerationReply(Response):
    """A response that generates while it is sent, and stops generating when its client leaves.

    A stream's headers are sent with its first tokens, so that a request which the backend refuses still gets the status
    that says so. What arrives together goes out in one HTTP chunk.
    """

    def __init__(self, generation: Generation, writer: ReplyWriter, *, stream: bool, open_replies: OpenReplies) -> None:
        super().__init__()
        self._generation = generation
        self._writer = writer
        self._stream = stream
        self._open_replies = open_replies
        self._work: asyncio.Task[None] | None = None
        self._started = False
        self._all_said = False
        self._server_ends = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `ApiError` if nothing was sent yet.

        A client that leaves is counted once, whoever notices first: some servers say so, Serve cancels the request.
        """
        if self._open_replies.ended:
            raise ApiError.of_backend(_server_ends())
        self._work = asyncio.create_task(self._send_stream(send) if self._stream else self._send_whole(send))
        self._open_replies.add(self)
        try:
            await run_until_disconnect(receive, self._work)
        except ClientDisconnected:
            if not self._started:
                raise  # to be answered, though nobody reads it, and counted there
            self._count_departure()
        except asyncio.CancelledError:
            self._count_departure()
            raise
        finally:
            self._open_replies.remove(self)

    def end(self) -> None:
        """The server ends: so does a stream, with an error event; any other reply is a 503."""
        if self._work is not None and not self._all_said:
            self._server_ends = True
            self._work.cancel()

    def _count_departure(self) -> None:
        self._generation.observer.on_error(self._generation.model.name, CLIENT_CLOSED_REQUEST)

    async def _send_whole(self, send: Send) -> None:
        deltas: list[list[OutputDelta]] = [[] for _ in range(self._generation.num_choices)]
        try:
            async with aclosing(self._generation.deltas()) as batches:
                async for batch in batches:
                    for delta in batch:
                        deltas[delta.index].append(delta)
        except BackendError as error:
            raise ApiError.of_backend(error) from error
        except asyncio.CancelledError:
            if not self._server_ends:
                raise
            raise ApiError.of_backend(_server_ends()) from None
        self._all_said = True
        body = self._writer.whole(deltas)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        try:
            async with aclosing(self._generation.deltas()) as batches:
                async for batch in batches:
                    await self._send_events(send, b"".join([self._writer.event(delta) for delta in batch]))
            self._all_said = True
            await self._send_events(send, self._writer.closing() + sse.DONE)
        except (Exception, asyncio.CancelledError) as caught:
            if isinstance(caught, asyncio.CancelledError) and not self._server_ends:
                raise
            error = caught if isinstance(caught, Exception) else _server_ends()
            if not self._started and isinstance(error, BackendError):
                raise ApiError.of_backend(error) from caught
            if not self._started:
                raise
            self._all_said = True
            await self._send_events(send, sse.frame(self._error_body(error)))
        await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, send: Send, events: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
            events = self._writer.opening() + events
        if events:
            await send({"type": "http.response.body", "body": events, "more_body": True})

    def _error_body(self, error: Exception) -> bytes:
        """The error event that ends a stream; its status can no longer be said."""
        if isinstance(error, BackendError):
            failure = ApiError.of_backend(error)
        else:
            logger.error("Request %s failed within its stream.", self._generation.request_id, exc_info=error)
            failure = ApiError("The server failed on this request.", status=500)
        self._generation.observer.on_error(self._generation.model.name, failure.status)
        return failure.body()
