"""One unary `generate` call of an ingress to a replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from ray.serve.exceptions import RequestCancelledError

from ridgewalk.replica.protocol import Finish, GenerateCall, GenerateReply, SequenceSpec
from ridgewalk.replica.replica_link import ReplicaLink

ABORT_TIMEOUT_S = 5.0
"""How long a call that was told to end may stay open before it is cancelled through Ray."""


class OpenCall:
    """Sends the call at once; ``on_done`` is called when its reply, or its failure, is there."""

    def __init__(
        self,
        link: ReplicaLink,
        call_id: str,
        ingress_id: str,
        sequences: list[SequenceSpec],
        resumed: bool,
        on_done: Callable[[], None],
    ) -> None:
        self.link = link
        self.call_id = call_id
        call = GenerateCall(call_id, ingress_id, sequences, resumed)
        self._response = link.handle.generate.remote(msgspec.msgpack.encode(call), replica_id=link.replica_id)
        self._task = asyncio.create_task(self._receive())
        self._task.add_done_callback(lambda task: on_done())

    @property
    def done(self) -> bool:
        """True when `reply` can be called."""
        return self._task.done()

    def reply(self) -> GenerateReply:
        """The replica's reply. Raises what the call raised: Ray's errors when the replica is lost."""
        return self._task.result()

    def release(self, abort: bool) -> None:
        """Nobody waits for the reply any more. ``abort``: some of its sequences still run, and shall not."""
        if self._task.done() and not self._task.cancelled():
            self._task.exception()  # taken note of, or asyncio complains
            return
        if abort:
            self.link.send(Finish(self.call_id, -1, "abort"))
        if self.link.closed:
            self._cancel()
        else:
            asyncio.get_running_loop().call_later(ABORT_TIMEOUT_S, self._cancel)

    def _cancel(self) -> None:
        if not self._task.done():
            self._response.cancel()
            self._task.cancel()

    async def _receive(self) -> GenerateReply:
        try:
            return msgspec.msgpack.decode(await self._response, type=GenerateReply)
        except RequestCancelledError:  # Serve cancels a request's calls when its client leaves
            raise asyncio.CancelledError from None
