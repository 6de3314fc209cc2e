"""How many sequences may wait on a replica, and what a client that is refused is told."""

from __future__ import annotations

from collections import deque

UNKNOWN_RETRY_AFTER_S = 5.0
"""What a refused client is told while too few sequences end to know better."""

RATE_WINDOW_S = 60.0
"""Sequences that ended longer ago say nothing of how soon a seat will be free."""


class WaitingLimit:
    """Limits the waiting queue to ``max_waiting`` sequences beyond the free seats.

    ``num_free`` is how many of those waiting could begin at once: none where KV cache is what they wait for, however
    many seats there are.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._end_times: deque[float] = deque(maxlen=1024)

    def note_end(self, now: float) -> None:
        """A sequence ran to its end: seats become free at this rate."""
        self._end_times.append(now)

    def refuses(self, num_new: int, num_waiting: int, num_free: int) -> bool:
        """True when new sequences would wait behind too many. An empty queue takes a request of any size."""
        return num_waiting > 0 and self._excess(num_new, num_waiting, num_free) > 0

    def retry_after(self, num_new: int, num_waiting: int, num_free: int, now: float) -> float:
        """Seconds until the queue has room, at the rate at which sequences have ended in the last minute."""
        while self._end_times and now - self._end_times[0] > RATE_WINDOW_S:
            self._end_times.popleft()
        if len(self._end_times) < 2:
            return UNKNOWN_RETRY_AFTER_S
        rate = len(self._end_times) / max(now - self._end_times[0], 1e-3)
        return max(1.0, self._excess(num_new, num_waiting, num_free) / rate)

    def _excess(self, num_new: int, num_waiting: int, num_free: int) -> int:
        return num_waiting + num_new - num_free - self._max_waiting
