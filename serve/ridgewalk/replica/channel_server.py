"""The replica's end of the token channel: which ingresses listen, and one frame per step to each."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import zmq

from ridgewalk.replica.protocol import (
    Attach,
    Finish,
    Frame,
    Introduction,
    LoadReport,
    MetricsQuery,
    ReplicaMetrics,
    Resend,
    TokenChunk,
    ToReplica,
)

logger = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT_S = 3.0
"""An ingress not heard for so long is gone: its requests are aborted."""

MAX_MESSAGE_BYTES = 2**20
"""Of what an ingress may send: its messages are small."""

SEND_QUEUE_FRAMES = 4096
"""Frames queued for an ingress that does not read; beyond it frames are dropped, and it asks for them again."""


Message = TypeVar("Message")


def decode_stranger(decoder: msgspec.msgpack.Decoder[Message], frames: list[bytes]) -> Message | None:
    """The message of a ROUTER's ``[identity, payload]``, or None: anybody on the network may send anything."""
    if len(frames) != 2:
        return None
    try:
        return decoder.decode(frames[1])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


@dataclass
class _Ingress:
    introduction: Introduction
    last_heard: float
    routing_id: bytes | None = None  # None until it attached
    dropped_frames: int = 0


class ChannelServer:
    """A ZeroMQ ROUTER. Used from one thread; sending never blocks."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.epoch = secrets.token_hex(8)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to nobody, or to a full queue, is an error
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # an ingress that reconnects takes its place again
        self.socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_FRAMES)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        port = self.socket.bind_to_random_port(f"tcp://{address}")
        self.endpoint = f"tcp://{address}:{port}"
        self._ingresses: dict[str, _Ingress] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToReplica)

    def introduce(self, introduction: Introduction, now: float) -> None:
        """Accept an ingress; it came through Ray, so it is one of ours."""
        self._ingresses[introduction.ingress_id] = _Ingress(introduction, now)

    def receive(self) -> list[tuple[bytes, ToReplica]]:
        """Messages that came, with the routing ids of who sent them. Never waits."""
        messages: list[tuple[bytes, ToReplica]] = []
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            message = decode_stranger(self._decoder, frames)
            if message is not None:
                messages.append((frames[0], message))

    def accept(
        self, messages: list[tuple[bytes, ToReplica]], now: float
    ) -> list[tuple[str, Finish | Resend | MetricsQuery]]:
        """What attached ingresses ask for, with their ids; who is unknown is ignored."""
        requests: list[tuple[str, Finish | Resend | MetricsQuery]] = []
        for routing_id, message in messages:
            self._take(routing_id, message, now, requests)
        return requests

    def send(
        self, ingress_id: str, chunks: list[TokenChunk], load: LoadReport, metrics: ReplicaMetrics | None = None
    ) -> None:
        """One frame, or none if the ingress cannot take it now: it notices the gap and asks again."""
        ingress = self._ingresses.get(ingress_id)
        if ingress is None or ingress.routing_id is None:
            return
        frame = Frame(self.epoch, ingress.introduction.secret, chunks, load, metrics)
        try:
            self.socket.send_multipart([ingress.routing_id, self._encoder.encode(frame)], zmq.NOBLOCK)
        except zmq.Again:
            if ingress.dropped_frames == 0:
                logger.warning("ingress %s does not keep up; its frames are dropped until it does", ingress_id)
            ingress.dropped_frames += 1
        except zmq.ZMQError:
            ingress.routing_id = None  # disconnected; it attaches again or its heartbeat runs out
        else:
            ingress.dropped_frames = 0

    def is_attached(self, ingress_id: str) -> bool:
        """True for an ingress that frames are sent to."""
        ingress = self._ingresses.get(ingress_id)
        return ingress is not None and ingress.routing_id is not None

    def ingress_ids(self) -> list[str]:
        """Ingresses that frames are sent to."""
        return [ingress_id for ingress_id, ingress in self._ingresses.items() if ingress.routing_id is not None]

    def introductions(self) -> list[Introduction]:
        """Attached ingresses. May be called from any thread."""
        return [ingress.introduction for ingress in list(self._ingresses.values()) if ingress.routing_id is not None]

    def forget_silent(self, now: float) -> list[str]:
        """Ingresses whose heartbeat ran out; they are forgotten."""
        silent = [key for key, ingress in self._ingresses.items() if now - ingress.last_heard > HEARTBEAT_TIMEOUT_S]
        for ingress_id in silent:
            del self._ingresses[ingress_id]
        return silent

    def close(self) -> None:
        """Drop everything queued."""
        self.socket.close()

    def _take(
        self,
        routing_id: bytes,
        message: ToReplica,
        now: float,
        requests: list[tuple[str, Finish | Resend | MetricsQuery]],
    ) -> None:
        if isinstance(message, Attach):
            ingress = self._ingresses.get(message.ingress_id)
            if ingress is not None and secrets.compare_digest(
                ingress.introduction.secret.encode(), message.secret.encode()
            ):
                ingress.routing_id = routing_id
                ingress.last_heard = now
            return
        found = next((item for item in self._ingresses.items() if item[1].routing_id == routing_id), None)
        if found is None:
            return
        ingress_id, ingress = found
        ingress.last_heard = now
        requests.append((ingress_id, message))
