"""Who is refused, and what it is told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.replica.waiting_limit import WaitingLimit


@given(st.integers(1, 5000), st.integers(0, 64))
def test_an_empty_queue_refuses_nobody(num_new: int, num_free: int) -> None:
    assert not WaitingLimit(max_waiting=2).refuses(num_new, 0, num_free)


def test_free_seats_are_not_waiting() -> None:
    limit = WaitingLimit(max_waiting=2)
    assert not limit.refuses(3, 1, 4)
    assert limit.refuses(3, 1, 0)


def test_the_time_to_wait_follows_the_rate_of_the_last_minute() -> None:
    limit = WaitingLimit(max_waiting=2)
    assert limit.retry_after(1, 4, 0, 0.0) == 5.0  # unknown
    for second in range(10):
        limit.note_end(float(second))
    assert limit.retry_after(1, 11, 0, 10.0) == 10.0  # ten too many, one a second
    assert limit.retry_after(1, 11, 0, 100.0) == 5.0  # too long ago to tell
