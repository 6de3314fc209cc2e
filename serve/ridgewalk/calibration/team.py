"""Processes that measure at the same time, in turns with others, and what they tell."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from typing import Any

from typing_extensions import Self

TIMEOUT_S, EXIT_S = 300.0, 10.0
_READY, _GO, _STOP = b"ready", b"go", b"stop"


class CalibrationError(RuntimeError):
    """Something could not be measured; the message says what and why."""


class Turns:
    """A process's end: ``for _ in turns`` measures once whenever its team has a turn, and sleeps between."""

    def __init__(self, end: Connection, barrier: Barrier) -> None:
        self._end, self._barrier = end, barrier

    def __iter__(self) -> Iterator[None]:
        self._end.send_bytes(_READY)
        while self._end.recv_bytes() == _GO:
            yield
            self._end.send_bytes(_READY)

    def together(self) -> None:
        """Wait for the others of the team."""
        self._barrier.wait()

    def tell(self, found: bytes) -> None:
        """What was measured, after the last turn."""
        self._end.send_bytes(found)


class Team:
    """A process for each of some arguments, that calls ``work(turns, *arguments)``; they last while it is entered.

    A machine is slower at some times than at others, for seconds or minutes: figures that are compared are measured
    in turns, pass by pass, so that its pace is common to all of them. Hence processes that stay, and sleep meanwhile.
    """

    def __init__(self, about: str, work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        """``about``: for who watches the progress."""
        self.about = about
        self._work, self._arguments = work, arguments
        self._processes: list[BaseProcess] = []
        self._ends: list[Connection] = []
        self.told: list[bytes] = []

    def __enter__(self) -> Self:
        """Start them, and wait until all can measure.

        Raises:
            CalibrationError: one has ended without a word, or takes too long; as every other method.
        """
        context = multiprocessing.get_context("spawn")  # each has its own threads, and nothing of this process
        self._barrier = context.Barrier(len(self._arguments), timeout=TIMEOUT_S)
        try:
            for each in self._arguments:
                own, others = context.Pipe()
                arguments = (Turns(others, self._barrier), self._work, each)
                self._processes.append(context.Process(target=_measure, args=arguments, daemon=True))
                self._processes[-1].start()
                self._ends.append(own)
                others.close()  # so that the end of the process is seen here
            self._heard()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def turn(self) -> None:
        """Let all of them measure once."""
        self._say(_GO)
        self._heard()

    def finish(self) -> None:
        """There are no more turns: keep what each tells of them."""
        self._say(_STOP)
        self.told = self._heard()

    def _say(self, word: bytes) -> None:
        for number, end in enumerate(self._ends):
            try:
                end.send_bytes(word)
            except OSError:
                raise ended_early(number) from None

    def _heard(self) -> list[bytes]:
        return [receive(number, end) for number, end in enumerate(self._ends)]

    def _end(self) -> None:
        self._barrier.abort()
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(EXIT_S)
            process.kill()  # does nothing to one that has ended
            process.join()


def receive(number: int, end: Connection) -> bytes:
    """What a process says next.

    Raises:
        CalibrationError: it has ended, or takes too long.
    """
    if not end.poll(TIMEOUT_S):
        raise CalibrationError(f"rank {number} has measured nothing within {TIMEOUT_S:.0f} s")
    try:
        return end.recv_bytes()
    except (EOFError, OSError):
        raise ended_early(number) from None


def ended_early(number: int) -> CalibrationError:
    """The error that a process is gone."""
    return CalibrationError(f"rank {number} ended before it had measured anything")


def _measure(turns: Turns, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started this one ends it
    with contextlib.suppress(EOFError):  # the team has ended
        work(turns, *arguments)
