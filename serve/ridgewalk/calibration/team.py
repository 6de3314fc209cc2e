"""Processes that measure at the same time, in turns with others, and what they tell."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
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
    in turns, so that its pace is common to all of them. Hence processes that stay, and sleep meanwhile.
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
        barrier = context.Barrier(len(self._arguments), timeout=TIMEOUT_S)
        try:
            for each in self._arguments:
                own, others = context.Pipe()
                self._ends.append(own)
                process = context.Process(target=_measure, args=(Turns(others, barrier), self._work, each), daemon=True)
                process.start()
                self._processes.append(process)
                others.close()  # so that the end of the process is seen here
            self._heard()
        except OSError as error:
            self._end(0.0)
            raise CalibrationError(f"{self.about}: a process could not be started: {error}") from None
        except BaseException:
            self._end(0.0)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end(EXIT_S if self.told else 0.0)

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
                raise self._ended_early(number) from None

    def _heard(self) -> list[bytes]:
        """What each says next. The first to end is named, not those that miss it."""
        numbers = {end: number for number, end in enumerate(self._ends)}
        heard: dict[int, bytes] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(heard) < len(numbers):
            silent = [end for end, number in numbers.items() if number not in heard]
            ready = wait(silent, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise CalibrationError(f"{self.about}: nothing was measured within {TIMEOUT_S:.0f} s")
            for end in ready:
                assert isinstance(end, Connection)
                try:
                    heard[numbers[end]] = end.recv_bytes()
                except (EOFError, OSError):
                    raise self._ended_early(numbers[end]) from None
        return [heard[number] for number in range(len(numbers))]

    def _ended_early(self, number: int) -> CalibrationError:
        process = self._processes[number]
        process.join(1.0)
        how = f"with exit code {process.exitcode}; what it said of it is above"
        if process.exitcode is not None and process.exitcode < 0:
            how = f"by {signal.Signals(-process.exitcode).name}; is the machine out of memory?"
        return CalibrationError(f"{self.about}: process {number + 1} of {len(self._ends)} was ended {how}")

    def _end(self, patience_s: float) -> None:
        # Not by breaking the barrier: that waits for whoever sleeps there, dead or alive.
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(patience_s)
            process.kill()  # does nothing to one that has ended
            process.join()


def _measure(turns: Turns, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started this one ends it
    with contextlib.suppress(EOFError, BrokenPipeError, threading.BrokenBarrierError):  # the team has ended
        work(turns, *arguments)
