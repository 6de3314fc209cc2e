"""An ingress's connection to one replica's token channel."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

import msgspec
import zmq
from ray.serve.handle import DeploymentHandle

from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.replica.protocol import (
    Attach,
    ChannelAddress,
    Finish,
    Frame,
    LoadReport,
    MetricsQuery,
    ReplicaMetrics,
    Resend,
    TokenChunk,
)
from ridgewalk.routing.replica_load import GroupKV, ReplicaLoad

SILENT_AFTER_S = 3.0
"""A replica reports every 100 ms; one not heard for so long is connected to anew."""


MAX_STEP_REPORTS = 64
"""Kept while nobody asks for them; older ones are forgotten."""


class Subscriber(Protocol):
    """Who follows a call on a link."""

    def on_chunk(self, chunk: TokenChunk) -> None:
        """Tokens of the call, or the end of one of its sequences."""
        ...

    def on_link_lost(self) -> None:
        """Nothing will come any more."""
        ...


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
        self.closed = False
        self._address = address
        self._attach = attach
        self._subscribers: dict[str, tuple[Subscriber, int]] = {}  # by request id; with its number of sequences
        self._avoided_until = 0.0
        self._queries: dict[int, asyncio.Future[ReplicaMetrics | None]] = {}  # by number
        self._last_query = 0
        self._steps: deque[StepMeans] = deque(maxlen=MAX_STEP_REPORTS)
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
    def routable(self) -> bool:
        """True when the replica has reported and nothing speaks against sending it a request."""
        return self.load is not None and not self.closed and self._event_loop.time() >= self._avoided_until

    @property
    def silent(self) -> bool:
        """True when the replica has not been heard for too long."""
        return self._event_loop.time() - self._last_heard > SILENT_AFTER_S

    @property
    def in_use(self) -> bool:
        """True while somebody follows a call."""
        return bool(self._subscribers)

    def avoid(self, seconds: float) -> None:
        """Send nothing new here for a while; what runs goes on."""
        self._avoided_until = self._event_loop.time() + seconds

    def subscribe(self, request_id: str, subscriber: Subscriber, num_sequences: int) -> None:
        """Follow a call."""
        self._subscribers[request_id] = subscriber, num_sequences

    def unsubscribe(self, request_id: str) -> None:
        """Ignore what still comes for a call."""
        self._subscribers.pop(request_id, None)

    def heartbeat(self) -> None:
        """Say that this ingress is there."""
        self.send(self._attach)

    async def ask_metrics(self) -> ReplicaMetrics | None:
        """The replica's metrics, or None when the link is lost meanwhile. Waits as long as it takes.

        Over the channel and not by a call through Ray: on a machine whose cores are taken each thread on the way is one
        more that waits for its turn, and here it is only the engine's own.
        """
        self._last_query += 1
        number = self._last_query
        answer = self._queries[number] = self._event_loop.create_future()
        self.send(MetricsQuery(number))
        try:
            return None if self.closed else await answer
        finally:
            del self._queries[number]

    def send(self, message: Attach | Finish | Resend | MetricsQuery) -> None:
        """Queue a message. Dropped when the queue is full; whoever needs an answer asks again."""
        if self.closed:
            return
        try:
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return
        # ZeroMQ's descriptor is edge-triggered: sending may swallow the edge of a frame that came meanwhile.
        self._event_loop.call_soon(self._read)

    def routing_load(self) -> ReplicaLoad:
        """The load as the routing policy sees it. Requires `routable`."""
        load = self.load
        assert load is not None
        return ReplicaLoad(
            self.replica_id,
            self.placement,
            load.num_running,
            load.num_waiting,
            sum(count for _, count in self._subscribers.values()),
            load.num_seats,
            tuple(
                GroupKV(group.total_blocks, group.total_blocks - group.used_blocks, group.predicted_peak_blocks)
                for group in load.groups
            ),
            self._address.block_size,
            self._address.num_ranks,
            self._address.caches_prefixes,
        )

    def take_steps(self) -> list[StepMeans]:
        """What the replica reported of its steps since the last call."""
        steps = list(self._steps)
        self._steps.clear()
        return steps

    def close(self) -> None:
        """Disconnect and tell everybody who follows a call. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._event_loop.remove_reader(self._socket.getsockopt(zmq.FD))
        self._socket.close()
        subscribers, self._subscribers = self._subscribers, {}
        for subscriber, _ in subscribers.values():
            subscriber.on_link_lost()
        for query in self._queries.values():
            if not query.done():
                query.set_result(None)

    def _read(self) -> None:
        while not self.closed:
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            frame = self._decoder.decode(payload)
            if frame.epoch == self._address.epoch and frame.secret == self._attach.secret:
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        self._last_heard = self._event_loop.time()
        self.load = frame.load
        if frame.load.steps is not None:
            self._steps.append(frame.load.steps)
        for chunk in frame.chunks:
            subscriber = self._subscribers.get(chunk.request_id)
            if subscriber is not None:
                subscriber[0].on_chunk(chunk)
        if frame.metrics is not None:
            query = self._queries.get(frame.metrics.number)
            if query is not None and not query.done():
                query.set_result(frame.metrics)
