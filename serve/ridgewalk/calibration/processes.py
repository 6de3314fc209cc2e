"""Processes that measure at the same time, and what they tell."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S, EXIT_S = 300.0, 10.0


class CalibrationError(RuntimeError):
    """Something could not be measured; the message says what and why."""


def run_together(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[bytes]:
    """Call ``work(end, together, *arguments)`` in a new process for each of ``arguments``.

    It sends its bytes to ``end``; ``together`` is a barrier of all of them.

    Raises:
        CalibrationError: one has ended without a word, or takes too long.
    """
    context = multiprocessing.get_context("spawn")  # each has its own threads, and nothing of this process
    together = context.Barrier(len(arguments), timeout=TIMEOUT_S)
    ends, processes = [], []
    for each in arguments:
        own, others = context.Pipe(duplex=False)
        processes.append(context.Process(target=work, args=(others, together, *each), daemon=True))
        processes[-1].start()
        ends.append(own)
        others.close()  # so that the end of the process is seen here
    try:
        return [receive(number, end) for number, end in enumerate(ends)]
    finally:
        together.abort()
        for process in processes:
            process.join(EXIT_S)
            process.kill()  # does nothing to one that has ended
            process.join()


def receive(number: int, end: Connection) -> bytes:
    """What a process tells.

    Raises:
        CalibrationError: as `run_together`.
    """
    if not end.poll(TIMEOUT_S):
        raise CalibrationError(f"rank {number} has measured nothing within {TIMEOUT_S:.0f} s")
    try:
        return end.recv_bytes()
    except EOFError:
        raise CalibrationError(f"rank {number} ended before it had measured anything") from None
