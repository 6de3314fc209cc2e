"""How ingresses read each other's metrics: a small TCP server in each, found through the engine replicas.

Serve's HAProxy mode allows no custom router for the ingress deployment, so one ingress cannot call another by name
through a handle; but every replica knows every ingress that is attached to it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from ridgewalk.replica.protocol import Introduction

MAX_SNAPSHOT_BYTES = 64 * 2**20
ASK_TIMEOUT_S = 2.0
"""How long a connection may take to say its secret."""


class PeerServer:
    """Answers with this ingress's snapshot whoever knows its secret."""

    def __init__(self, secret: str, snapshot: Callable[[], bytes]) -> None:
        self._secret = secret
        self._snapshot = snapshot
        self._server: asyncio.Server | None = None

    async def start(self, address: str) -> str:
        """Listen on a free port; the endpoint ``address:port``."""
        self._server = await asyncio.start_server(self._answer, address, 0)
        return f"{address}:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = (await asyncio.wait_for(reader.readline(), ASK_TIMEOUT_S)).strip()
            if secrets.compare_digest(asked, self._secret.encode()):
                writer.write(self._snapshot())
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.TimeoutError):
            pass  # it went away, or was none of ours: nothing to tell it
        finally:
            writer.close()


async def ask_peer(peer: Introduction, timeout_s: float) -> bytes | None:
    """The snapshot of another ingress, or None when it does not answer in time."""

    async def ask() -> bytes:
        address, port = peer.endpoint.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(address, int(port))
        try:
            writer.write(peer.secret.encode() + b"\n")
            received = b""
            while chunk := await reader.read(2**16):
                received += chunk
                if len(received) > MAX_SNAPSHOT_BYTES:
                    return b""
            return received
        finally:
            writer.close()

    try:
        return await asyncio.wait_for(ask(), timeout_s) or None
    except (OSError, asyncio.TimeoutError):
        return None
