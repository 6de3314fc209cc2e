"""The life of one rank: say hello, load, compute steps until told to stop. torch is imported here and nowhere above."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable

import msgspec
import zmq

from ridgewalk.logs import configure_logging
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.host import check_cpus, free_port, memory_bytes
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
    ToRank,
)

PROGRESS_EVERY_S = 0.5

CPU_RANK_NICENESS = 5
"""Ranks that compute on CPUs take every core there is; whoever feeds them and answers clients needs little, but at
once."""


class RankConnection:
    """The rank's end of the wire."""

    def __init__(self, launch: RankLaunch) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, launch.identity)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(launch.endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToRank)
        self._parent = os.getppid()

    def send(self, message: FromRank) -> None:
        """Queue a message; never waits."""
        self._socket.send(self._encoder.encode(message))

    def receive(self) -> Begin | Run | Stop:
        """Wait for the executor's next word; `Stop` when the parent process is gone."""
        while not self._socket.poll(1000):
            if os.getppid() != self._parent:
                return Stop()
        return self._decoder.decode(self._socket.recv())

    def local_address(self) -> str:
        """This host's address as the executor's host sees it."""
        host = self._socket.getsockopt(zmq.LAST_ENDPOINT).decode().removeprefix("tcp://").rsplit(":", 1)[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: asks the kernel which interface leads there
            return str(probe.getsockname()[0])

    def close(self) -> None:
        """Flush what was sent."""
        self._socket.close()
        self._context.term()


def run_rank(launch: RankLaunch) -> None:
    """Serve one rank until the executor stops it, it disappears, or something fails."""
    configure_logging()
    connection = RankConnection(launch)
    try:
        _serve(launch, connection)
    except Exception as error:
        # Expected errors (a checkpoint, a configuration) are sentences; anything else also goes to the log.
        expected = isinstance(error, ValueError | OSError)
        message = (str(error) or type(error).__name__).removeprefix(f"rank {launch.rank}: ")
        where = f"rank {launch.rank} of {launch.engine.model_name}"
        connection.send(Failed(launch.rank, f"{where}: {message}", "" if expected else traceback.format_exc()))
        connection.close()
        raise SystemExit(1) from None
    connection.close()


def _serve(launch: RankLaunch, connection: RankConnection) -> None:
    from ridgewalk.model.runner import create_runner, device_memory, multiplies_fp8  # torch, only here

    engine = launch.engine
    if engine.device == "cpu":
        os.nice(CPU_RANK_NICENESS)
    if engine.cpus is not None:
        check_cpus(engine.cpus)
        os.sched_setaffinity(0, engine.cpus)  # threads to come inherit it, and collectives ask how many they may use
    memory = device_memory(engine.device)[0] if engine.device == "cuda" else memory_bytes()
    address = connection.local_address()
    fp8 = multiplies_fp8(engine.device, ModelSpec.from_folder(engine.model_path), engine.dtype)
    connection.send(
        Hello(launch.rank, os.getpid(), address, free_port(), memory, socket.gethostname(), fp8, memory_bytes())
    )
    begin = connection.receive()
    if not isinstance(begin, Begin):
        return
    runner = create_runner(engine.runner_config(launch.rank, begin.num_threads, begin.init_method, begin.keeps_fp8))
    runner.load(progress=_progress(launch.rank, connection))
    runner.allocate(begin.num_blocks, begin.num_swap_blocks)
    runner.warm_up()
    connection.send(Ready(launch.rank))
    group, _, _ = engine.mesh.coordinates(launch.rank)
    while isinstance(message := connection.receive(), Run):
        output = runner.execute(message.step)
        if output is not None:
            connection.send(StepDone(message.step.step_id, group, output))
        if (timings := runner.timings()) is not None:
            connection.send(Measured(timings))
    runner.close()


def _progress(rank: int, connection: RankConnection) -> Callable[[int, int], None]:
    last = 0.0

    def report(done_bytes: int, total_bytes: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY_S or done_bytes == total_bytes:
            last = now
            connection.send(Loading(rank, done_bytes, total_bytes))

    return report
