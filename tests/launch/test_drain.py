"""What `drain` makes of a service that does not answer: only one that has ended has no requests left."""

from __future__ import annotations

import socket
import threading

from ridgewalk.launch.service import drain
from ridgewalk.replica.host import free_port


def test_a_service_too_busy_to_answer_may_have_requests_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not drain(f"http://127.0.0.1:{silent.getsockname()[1]}", threading.Event(), timeout_s=0.2)


def test_a_service_that_has_ended_has_none() -> None:
    assert drain(f"http://127.0.0.1:{free_port('127.0.0.1')}", threading.Event(), timeout_s=60)
