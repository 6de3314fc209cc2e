"""Rank processes without Ray: plain children of this process, on this host."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import msgspec

from ridgewalk.replica.rank_protocol import RankLaunch

STOP_GRACE_S = 2.0
"""For all ranks together, until the hung ones are killed."""


class SpawnedRanks:
    """Implements `zmq_executor.RankLauncher` with subprocesses."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, launches: list[RankLaunch]) -> None:
        for launch in launches:
            process = subprocess.Popen(
                [sys.executable, "-m", "ridgewalk.replica.rank_process"],
                stdin=subprocess.PIPE,
                env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            )
            self._processes.append(process)
            assert process.stdin is not None
            process.stdin.write(msgspec.msgpack.encode(launch))
            process.stdin.close()

    def ended(self) -> tuple[int, str] | None:
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                return rank, _how(process.returncode)
        return None

    def stop(self) -> None:
        deadline = time.monotonic() + STOP_GRACE_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            process.kill()  # does nothing to one that has ended
        for process in self._processes:
            process.wait()
        self._processes = []

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]


def _how(returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"
