"""This machine: its cores, its CPU, and the cache of what was compiled for it or measured on it."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """Where compiled kernels and calibrations are kept: $RIDGEWALK_CACHE, else ~/.cache/ridgewalk."""
    return Path(os.environ.get("RIDGEWALK_CACHE") or Path.home() / ".cache" / "ridgewalk")


def calibration_path() -> Path:
    """The hardware file of this kind of CPU with so many cores: a home folder may be shared by several machines."""
    digest = hashlib.sha256()
    for part in (platform.machine(), *cpu_flags(), str(num_cores())):
        digest.update(part.encode())
    return cache_folder() / f"this-machine-{digest.hexdigest()[:12]}.yaml"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpu_name() -> str:
    """As the system calls it."""
    named = [line.partition(":")[2].strip() for line in cpu_flags() if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Instruction sets and name of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    wanted = ("flags", "Features", "model name")
    return [next((line for line in lines if line.startswith(name)), "") for name in wanted]
