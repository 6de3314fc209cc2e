"""How a service is asked to end: the first signal, and the impatient second."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked us to end. Like KeyboardInterrupt no handler of errors swallows it, asyncio's neither."""


class StopSignals:
    """While entered, the first SIGINT or SIGTERM raises `Stopped` in the main thread; a later one sets `again`."""

    def __init__(self) -> None:
        self.again = threading.Event()
        self._stopping = False
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals; once more after Ray has connected, for it takes SIGTERM."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def begin_stop(self) -> None:
        """The end has begun, whatever the reason: from now on a signal can only hasten it."""
        self._stopping = True
        signal.alarm(0)  # a SIGTERM while Ray connects meets Ray's own handler first, which sets one to abort us
        self.install()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            self.again.set()
            return
        self._stopping = True
        raise Stopped


def wait_for_stop() -> None:
    """Sleep until a signal raises `Stopped`."""
    while True:
        time.sleep(3600)
