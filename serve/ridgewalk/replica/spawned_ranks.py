"""Rank processes without Ray: plain children of this process, on this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import msgspec

from ridgewalk.replica.rank_protocol import RankLaunch

STOP_GRACE_S = 2.0


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
        for process in self._processes:
            try:
                process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
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
