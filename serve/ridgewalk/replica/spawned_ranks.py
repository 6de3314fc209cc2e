"""Rank processes without Ray: forked on this host by a process of our own."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

import msgspec

from ridgewalk.replica.rank_fork_server import LENGTH_BYTES, Ended, Report, Started
from ridgewalk.replica.rank_protocol import RankLaunch

STOP_GRACE_S = 2.0
"""For all ranks together, until the hung ones are killed."""


class SpawnedRanks:
    """Implements `zmq_executor.RankLauncher` with a `rank_fork_server`."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._reports = -1
        self._unread = b""
        self._num_ranks = 0
        self._pids: dict[int, int] = {}  # by rank
        self._first_end: tuple[int, str] | None = None

    def start(self, launches: list[RankLaunch]) -> None:
        self._num_ranks = len(launches)
        self._reports, theirs = os.pipe()
        os.set_blocking(self._reports, False)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "ridgewalk.replica.rank_fork_server", str(theirs)],
            stdin=subprocess.PIPE,
            pass_fds=(theirs,),
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        os.close(theirs)
        assert self._server.stdin is not None
        payload = msgspec.msgpack.encode(launches)
        self._server.stdin.write(len(payload).to_bytes(LENGTH_BYTES, "little") + payload)
        self._server.stdin.flush()

    def ended(self) -> tuple[int, str] | None:
        if self._server is None:
            return None
        gone = self._server.poll()  # before the reports are read: all of them are there then
        self._take_reports()
        if self._first_end is None and gone is not None:
            return 0, f"the process that starts the ranks ended: {_how(gone)}"
        return self._first_end

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_GRACE_S)
        assert server.stdin is not None
        server.stdin.close()  # it kills the ranks that are left, and ends
        server.wait()
        os.close(self._reports)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank. Waits until all are forked."""
        while len(self._pids) < self._num_ranks:
            select.select([self._reports], [], [], 1.0)
            end = self.ended()
            assert end is None or len(self._pids) == self._num_ranks, end
        return [self._pids[rank] for rank in range(self._num_ranks)]

    def _take_reports(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reports, 65536):
                self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            report = msgspec.json.decode(line, type=Report)
            if isinstance(report, Started):
                self._pids[report.rank] = report.pid
            elif isinstance(report, Ended) and self._first_end is None:
                self._first_end = report.rank, _how(report.returncode)


def _how(returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"
