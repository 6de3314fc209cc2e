"""An ingress's connection to one replica's token channel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import zmq
from ray.serve.handle import DeploymentHandle

from ridgewalk.replica.protocol import Attach, ChannelAddress, Finish, Frame, LoadReport, Resend, TokenChunk
from ridgewalk.routing.least_loaded import ReplicaLoad

SILENT_AFTER_S = 3.0
"""A replica reports every 100 ms; one not heard for so long is introduced to again."""


class ReplicaLink:
    """One ZeroMQ DEALER on the ingress's event loop. Frames are handed on as they arrive, never awaited."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        handle: DeploymentHandle,
        placement: str,
        replica_id: str,
        attach: Attach,
        address: ChannelAddress,
    ) -> None:
        self.handle = handle
        self.placement = placement
        self.replica_id = replica_id
        self.load: LoadReport | None = None
        self.num_sent = 0  # sequences sent since the last report
        self.closed = False
        self._epoch = address.epoch
        self._attach = attach
        self._streams: dict[str, Callable[[TokenChunk], None]] = {}  # by request id
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Frame)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, attach.ingress_id.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address.endpoint)
        self._event_loop = asyncio.get_running_loop()
        self._last_heard = self._event_loop.time()
        self._event_loop.add_reader(self._socket.getsockopt(zmq.FD), self._read)
        self.heartbeat()

    @property
    def ready(self) -> bool:
        """True once the replica has reported."""
        return self.load is not None and not self.closed

    @property
    def silent(self) -> bool:
        """True when the replica has not been heard for too long."""
        return self._event_loop.time() - self._last_heard > SILENT_AFTER_S

    def subscribe(self, request_id: str, on_chunk: Callable[[TokenChunk], None]) -> None:
        """Hand the chunks of a request to ``on_chunk``."""
        self._streams[request_id] = on_chunk

    def unsubscribe(self, request_id: str) -> None:
        """Ignore what still comes for a request."""
        self._streams.pop(request_id, None)

    def heartbeat(self) -> None:
        """Say that this ingress is there."""
        self.send(self._attach)

    def send(self, message: Attach | Finish | Resend) -> None:
        """Queue a message; dropped when the queue is full (heartbeats and resends are repeated)."""
        if self.closed:
            return
        try:
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return
        # ZeroMQ's descriptor is edge-triggered: sending may swallow the edge of a frame that came meanwhile.
        self._event_loop.call_soon(self._read)

    def routing_load(self) -> ReplicaLoad:
        """The load as the routing policy sees it. Requires `ready`."""
        load = self.load
        assert load is not None
        return ReplicaLoad(
            self.replica_id,
            load.num_running,
            load.num_waiting,
            self.num_sent,
            sum(group.total_blocks - group.used_blocks for group in load.groups),
            sum(group.total_blocks for group in load.groups),
        )

    def close(self) -> None:
        """Disconnect. Idempotent."""
        if not self.closed:
            self.closed = True
            self._event_loop.remove_reader(self._socket.getsockopt(zmq.FD))
            self._socket.close()

    def _read(self) -> None:
        while not self.closed:
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            frame = self._decoder.decode(payload)
            if frame.epoch == self._epoch and frame.secret == self._attach.secret:
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        self._last_heard = self._event_loop.time()
        self.load = frame.load
        self.num_sent = 0
        for chunk in frame.chunks:
            on_chunk = self._streams.get(chunk.request_id)
            if on_chunk is not None:
                on_chunk(chunk)
