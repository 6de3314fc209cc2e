"""What this host has: memory, CPUs, an address, a free port."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path


def memory_bytes() -> int:
    """Memory of the machine, or of the container if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def check_cpus(cpus: Sequence[int]) -> None:
    """Refuse CPUs that this process may not use; the system would leave them out in silence.

    Raises:
        ValueError: there are some.
    """
    usable = os.sched_getaffinity(0)
    if missing := [cpu for cpu in cpus if cpu not in usable]:
        raise ValueError(
            f"cpus: a process on {socket.gethostname()} may not use {_listed(missing)}; "
            f"there are {_listed(sorted(usable))}"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def free_port(address: str = "") -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
