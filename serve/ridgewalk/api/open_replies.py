"""The replies that are being generated, so that a server which ends can end them in order."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Endable(Protocol):
    """A reply that can be ended early."""

    def end(self) -> None:
        """Say that the server ends, in the form that the client still understands."""


class OpenReplies:
    """Those of one process. All on its event loop."""

    def __init__(self) -> None:
        self.ended = False
        self._replies: set[Endable] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()

    def add(self, reply: Endable) -> None:
        """A reply begins."""
        self._replies.add(reply)
        self._none_open.clear()

    def remove(self, reply: Endable) -> None:
        """It is complete, or its client has gone."""
        self._replies.discard(reply)
        if not self._replies:
            self._none_open.set()

    def end_all(self) -> None:
        """End what is open now; whoever looks at `ended` begins nothing more."""
        self.ended = True
        for reply in list(self._replies):
            reply.end()

    async def wait_ended(self) -> None:
        """Until every reply has been written to its end."""
        await self._none_open.wait()
