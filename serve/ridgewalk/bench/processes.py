"""Ends programs that have children of their own."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress

import psutil

GRACE_S = 10.0


def end_process_tree(process: subprocess.Popen[str]) -> None:
    """End ``process`` and all that it started: asked first, killed when that takes too long."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    if process.poll() is None:
        process.kill()
        process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, GRACE_S)
