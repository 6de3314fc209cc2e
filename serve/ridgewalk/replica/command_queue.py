"""A queue into a thread that sleeps in `poll`: putting something wakes it."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
from typing import Generic, TypeVar

Command = TypeVar("Command")


class CommandQueue(Generic[Command]):
    """`put` from any thread; everything else from the one that owns it."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closing = threading.Lock()
        self._closed = False

    def put(self, command: Command) -> None:
        """Queue a command and wake the owner. Nothing happens after `close`."""
        self._commands.put(command)
        self.wake()

    def wake(self) -> None:
        """Make `read_fd` readable."""
        with self._closing:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):  # full: there is a reason to wake already
                    os.write(self._write_fd, b"x")

    def drain(self) -> list[Command]:
        """Everything queued. Never waits."""
        try:
            os.read(self.read_fd, 65536)
        except BlockingIOError:
            return []
        commands = []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except queue.Empty:
                return commands

    def wait(self, timeout_s: float) -> None:
        """Until something is queued, or the timeout."""
        select.select([self.read_fd], [], [], timeout_s)

    def close(self) -> None:
        """Free the pipe. Idempotent."""
        with self._closing:
            if not self._closed:
                self._closed = True
                os.close(self.read_fd)
                os.close(self._write_fd)
