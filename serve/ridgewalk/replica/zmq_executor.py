"""The executor of ranks in other processes: one ZeroMQ message per step and rank, whoever started the processes."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
import zmq

from ridgewalk.engine.executor import ExecutorError
from ridgewalk.engine.step import RankTimings, StepInput, StepOutput
from ridgewalk.placement.memory import MemoryPlan
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.channel_server import decode_stranger
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.output_assembler import OutputAssembler
from ridgewalk.replica.rank_protocol import (
    Begin,
    Failed,
    FromRank,
    Hello,
    Loading,
    Measured,
    RankLaunch,
    Ready,
    Run,
    StepDone,
    Stop,
)
from ridgewalk.replica.sizing import check_host_memory, num_threads, size_cache

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""A rank that has not said `Hello` by then is not coming (no room on the cluster, a broken installation)."""

END_KNOWN_S = 1.0
"""The launcher knows of a rank's end by then; its connection is gone at once."""


class RankLauncher(Protocol):
    """Starts rank processes and notices when one ends."""

    def start(self, launches: list[RankLaunch]) -> None:
        """Start every rank. Does not wait for them."""
        ...

    def ended(self) -> tuple[int, str] | None:
        """A rank that has ended and why, or None while all run. Cheap: called whenever nothing has arrived."""
        ...

    def stop(self) -> None:
        """End every rank now, hung ones too. Idempotent."""
        ...


@dataclass(frozen=True)
class LoadProgress:
    """How far the ranks have read their weights."""

    done_bytes: int
    total_bytes: int


class ZmqExecutor:
    """Implements `engine.executor.Executor` over any `RankLauncher`.

    Raises:
        ExecutorError: a rank failed or ended while starting; the message is a sentence.
        MemoryPlanError: weights or one sequence do not fit.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        launcher: RankLauncher,
        address: str = "127.0.0.1",
        on_progress: Callable[[LoadProgress], None] = lambda progress: None,
    ) -> None:
        self.config = config
        self.spec = spec
        self._launcher = launcher
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromRank)
        self._outputs = OutputAssembler(config.dp)
        self._timings: dict[int, list[RankTimings]] = {}
        self._measured: list[list[RankTimings]] = []
        self._closed = False
        port = self.socket.bind_to_random_port(f"tcp://{address}")
        self._identities = [f"{rank}-{secrets.token_hex(16)}".encode() for rank in range(config.world_size)]
        endpoint = f"tcp://{address}:{port}"
        try:
            launcher.start(
                [RankLaunch(config, rank, endpoint, identity) for rank, identity in enumerate(self._identities)]
            )
            self.memory_plan = self._begin(on_progress)
        except BaseException:
            self.close()
            raise

    # -- engine.executor.Executor -----------------------------------------------------------------------------------

    def submit(self, step: StepInput) -> None:
        self._outputs.expect(step.step_id)
        self._send_all(Run(step))

    def wait(self, timeout_s: float) -> None:
        self.socket.poll(int(timeout_s * 1000))

    def collect(self) -> list[StepOutput]:
        while (message := self._receive(0)) is not None:
            if isinstance(message, StepDone):
                self._outputs.add(message.step_id, message.group, message.output)
            elif isinstance(message, Measured):
                self._add_timings(message.timings)
        outputs = self._outputs.take()
        if not outputs:
            self.check_ranks()
        return outputs

    def take_timings(self) -> list[list[RankTimings]]:
        measured, self._measured = self._measured, []
        return measured

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ExecutorError):  # a rank that cannot hear it is ended by the launcher
            self._send_all(Stop())
        self._launcher.stop()
        self.socket.close()
        self._context.term()

    # -- start ------------------------------------------------------------------------------------------------------

    def check_ranks(self) -> None:
        """Raise ExecutorError when a rank has ended."""
        ended = self._launcher.ended()
        if ended is not None:
            while self._receive(0.2) is not None:
                pass  # a last word of the rank says more than its exit status, and is raised by _receive
            raise ExecutorError(f"rank {ended[0]} of {self.config.model_name} ended: {ended[1]}")

    def _begin(self, on_progress: Callable[[LoadProgress], None]) -> MemoryPlan:
        world = self.config.world_size
        hellos = {message.rank: message for message in self._await(Hello, START_TIMEOUT_S, on_progress)}
        hosts = {hello.host for hello in hellos.values()}
        keeps_fp8 = all(hello.multiplies_fp8 for hello in hellos.values())  # ranks of a stage hold the same
        plan = size_cache(self.config, self.spec, min(hello.memory_bytes for hello in hellos.values()), keeps_fp8)
        most = max(Counter(hello.host for hello in hellos.values()).values())
        check_host_memory(self.config, min(hello.host_bytes for hello in hellos.values()), most)
        first = hellos[0]
        threads = num_threads(self.config, world // len(hosts))
        meeting = f"tcp://{first.address}:{first.free_port}"
        self._send_all(Begin(meeting, plan.num_blocks, plan.num_swap_blocks, threads, keeps_fp8))
        self._await(Ready, None, on_progress)
        return plan

    def _await(
        self, kind: type[Hello] | type[Ready], timeout_s: float | None, on_progress: Callable[[LoadProgress], None]
    ) -> list[Hello | Ready]:
        """One message of ``kind`` from every rank."""
        received: list[Hello | Ready] = []
        loading: dict[int, Loading] = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while len(received) < self.config.world_size:
            message = self._receive(0.1)
            if isinstance(message, kind):
                received.append(message)
            elif isinstance(message, Loading):
                loading[message.rank] = message
                if len(loading) < self.config.world_size:
                    continue  # the total is not known yet
                on_progress(
                    LoadProgress(
                        sum(item.done_bytes for item in loading.values()),
                        sum(item.total_bytes for item in loading.values()),
                    )
                )
            elif message is None:
                self.check_ranks()
                if deadline is not None and time.monotonic() > deadline:
                    missing = self.config.world_size - len(received)
                    raise ExecutorError(
                        f"{missing} of {self.config.world_size} ranks of {self.config.model_name} did not start within "
                        f"{timeout_s:.0f} s; check that the cluster has room for them (`ray status`)"
                    )
        return received

    # -- wire -------------------------------------------------------------------------------------------------------

    def _send_all(self, message: Begin | Run | Stop) -> None:
        payload = self._encoder.encode(message)
        for rank, identity in enumerate(self._identities):
            try:
                self.socket.send_multipart([identity, payload])
            except zmq.ZMQError as error:  # a step that one rank misses would leave the others waiting for it
                if not isinstance(message, Stop):
                    self._await_end()
                raise ExecutorError(f"rank {rank} of {self.config.model_name} is not connected: {error}") from None

    def _await_end(self) -> None:
        """Raise what ended a rank that does not listen any more, if the launcher hears of it soon."""
        deadline = time.monotonic() + END_KNOWN_S
        while time.monotonic() < deadline:
            self.check_ranks()
            time.sleep(0.02)

    def _receive(self, timeout_s: float) -> FromRank | None:
        """The next message of a rank, or None.

        Raises:
            ExecutorError: it was the rank's last word.
        """
        while self.socket.poll(int(timeout_s * 1000)):
            frames = self.socket.recv_multipart()
            message = decode_stranger(self._decoder, frames) if frames[0] in self._identities else None
            if message is None:
                continue
            if isinstance(message, Failed):
                if message.traceback:
                    logger.error("rank %d failed\n%s", message.rank, message.traceback)
                raise ExecutorError(message.message)
            return message
        return None

    def _add_timings(self, timings: RankTimings) -> None:
        ranks = self._timings.setdefault(timings.step_id, [])
        ranks.append(timings)
        if len(ranks) == self.config.world_size:
            self._measured.append(sorted(self._timings.pop(timings.step_id), key=lambda item: item.rank))
