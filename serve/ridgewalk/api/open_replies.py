"""The replies that are being generated, so that a server which ends can end them in order."""

from __future__ import annotations

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

    def add(self, reply: Endable) -> None:
        """A reply begins."""
        self._replies.add(reply)

    def remove(self, reply: Endable) -> None:
        """It is complete, or its client has gone."""
        self._replies.discard(reply)

    def end_all(self) -> None:
        """End what is open now; whoever looks at `ended` begins nothing more."""
        self.ended = True
        for reply in list(self._replies):
            reply.end()
