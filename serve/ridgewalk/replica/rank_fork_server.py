"""One process that imports torch once and forks a rank for each launch; it ends when they have ended, or its owner has.

Importing torch costs a rank seconds of processor time and a quarter of a gigabyte: forked ranks share both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback

import msgspec

from ridgewalk.replica.rank_process import run_rank
from ridgewalk.replica.rank_protocol import RankLaunch

LENGTH_BYTES = 8
"""Of the little-endian length before the launches on standard input, which stays open as long as the owner lives."""


class Started(msgspec.Struct, frozen=True, tag=True):
    """A rank was forked."""

    rank: int
    pid: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A rank has ended. ``returncode`` as `subprocess` has it: the negative signal for one that was killed."""

    rank: int
    returncode: int


Report = Started | Ended


def read_launches() -> list[RankLaunch]:
    """The launches that the owner wrote."""
    source = sys.stdin.buffer.raw  # type: ignore[attr-defined]  # unbuffered: nothing of it is in the forks
    length = int.from_bytes(_exactly(source.fileno(), LENGTH_BYTES), "little")
    return msgspec.msgpack.decode(_exactly(source.fileno(), length), type=list[RankLaunch])


def _exactly(descriptor: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(descriptor, count - len(data))
        if not piece:
            raise SystemExit(0)  # the owner is gone
        data += piece
    return data


def serve(launches: list[RankLaunch], reports: int) -> None:
    """Fork a rank for each launch and report what becomes of them, a line of JSON each, to a descriptor."""
    import ridgewalk.model.runner  # noqa: F401  # torch, for all of them

    ranks: dict[int, int] = {}  # by process id
    for launch in launches:
        pid = os.fork()
        if pid == 0:
            os.close(reports)
            _run_and_exit(launch)
        ranks[pid] = launch.rank
        _report(reports, Started(launch.rank, pid))
    threading.Thread(target=_kill_when_owner_is_gone, args=(ranks,), daemon=True).start()
    while ranks:
        pid, status = os.wait()
        _report(reports, Ended(ranks.pop(pid), os.waitstatus_to_exitcode(status)))


def _run_and_exit(launch: RankLaunch) -> None:
    status = 1
    try:
        run_rank(launch)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # what the fork server would do at its end is not the ranks' to do


def _report(descriptor: int, report: Report) -> None:
    with contextlib.suppress(BrokenPipeError):  # the owner is gone; its ranks are ended by the thread
        os.write(descriptor, msgspec.json.encode(report) + b"\n")


def _kill_when_owner_is_gone(ranks: dict[int, int]) -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written: this is its end
    for pid in list(ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Entry: the descriptor for reports is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, which then stops its ranks
    serve(read_launches(), int(sys.argv[1]))


if __name__ == "__main__":
    main()
