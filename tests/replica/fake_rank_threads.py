"""Ranks as threads that speak the real wire and compute nothing: to see what an executor makes of their messages."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Collection

import msgspec
import zmq

from ridgewalk.engine.step import RankTimings, StepInput
from ridgewalk.replica.rank_protocol import (
    Begin,
    Failed,
    FromRank,
    Hello,
    Measured,
    RankLaunch,
    Ready,
    Run,
    StepDone,
    Stop,
    ToRank,
)
from tests.engine.fake_ranks import FakeGroup


class FakeRank(threading.Thread):
    """One rank. It holds outputs back at random, more steps may come meanwhile, so that groups overtake one another."""

    def __init__(self, launch: RankLaunch, multiplies_fp8: bool) -> None:
        super().__init__(daemon=True)
        engine = launch.engine
        self.launch = launch
        self.multiplies_fp8 = multiplies_fp8
        self.dp, self.pp, self.tp = engine.mesh.coordinates(launch.rank)
        self.speaks = self.pp == engine.pp - 1 and self.tp == 0
        self.group = FakeGroup(engine.block_size)
        self.begin: Begin | None = None
        self.held: deque[FromRank] = deque()
        self.fail_at: int | None = None
        self.random = random.Random(launch.rank)

    def run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self.launch.identity)
        socket.connect(self.launch.endpoint)
        rank = self.launch.rank
        self._send(socket, Hello(rank, 0, "127.0.0.1", 1000 + rank, 2**40, "here", self.multiplies_fp8, 2**40))
        decoder = msgspec.msgpack.Decoder(ToRank)
        while True:
            if socket.poll(1):
                message = decoder.decode(socket.recv())
                if isinstance(message, Stop):
                    break
                self._take(socket, message)
            while self.held and self.random.random() < 0.3:
                self._send(socket, self.held.popleft())
        socket.close(0)
        context.term()

    def _take(self, socket: zmq.Socket[bytes], message: Begin | Run) -> None:
        if isinstance(message, Begin):
            self.begin = message
            self._send(socket, Ready(self.launch.rank))
        elif message.step.step_id == self.fail_at:
            self._send(socket, Failed(self.launch.rank, f"rank {self.launch.rank} fell over", ""))
        elif self.fail_at is None or message.step.step_id < self.fail_at:  # one that failed computes no more
            self._compute(message.step)

    def _compute(self, step: StepInput) -> None:
        output = self.group.execute(step.groups[self.dp])
        if self.speaks:
            self.held.append(StepDone(step.step_id, self.dp, output))
        if step.measure:
            self.held.append(Measured(RankTimings(step.step_id, self.launch.rank, 0.001, {}, [])))

    def _send(self, socket: zmq.Socket[bytes], message: FromRank) -> None:
        socket.send(msgspec.msgpack.encode(message))


class FakeRankThreads:
    """Implements `zmq_executor.RankLauncher`."""

    def __init__(self, fp8_ranks: Collection[int] = ()) -> None:
        self.fp8_ranks = fp8_ranks
        self.ranks: list[FakeRank] = []

    def start(self, launches: list[RankLaunch]) -> None:
        self.ranks = [FakeRank(launch, launch.rank in self.fp8_ranks) for launch in launches]
        for rank in self.ranks:
            rank.start()

    def ended(self) -> tuple[int, str] | None:
        return None

    def stop(self) -> None:
        for rank in self.ranks:
            rank.join()
