"""Server-sent events: the framing of streams."""

from __future__ import annotations

DONE = b"data: [DONE]\n\n"

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would collect the events
]


def frame(data: bytes) -> bytes:
    """One event; ``data`` is JSON and so has no newline of its own."""
    return b"data: " + data + b"\n\n"
