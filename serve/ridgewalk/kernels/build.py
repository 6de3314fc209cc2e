"""Compiles the C++ kernels at first use and keeps the library in a cache, one per source, compiler and CPU."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from ridgewalk.machine import cache_folder, cpu_flags

logger = logging.getLogger(__name__)

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native" if platform.machine() == "x86_64" else "-mcpu=native",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-w",
)


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message says why."""


def load_library() -> ctypes.CDLL | None:
    """The compiled kernels; None, after one warning, where they cannot be built.

    Call it once a process and pass the result on. Several processes may call it at once: one compiles, the others wait.
    """
    try:
        path = build_library(cache_folder())
        return ctypes.CDLL(str(path))
    except (BuildError, OSError) as error:
        logger.warning("the C++ kernels are not available, torch's slower operations are used instead: %s", error)
        return None


def build_library(folder: Path) -> Path:
    """Path of the compiled library, compiling it if the cache has none for this source, compiler and CPU.

    Raises:
        BuildError: there is no compiler, or it fails.
        OSError: the cache cannot be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("no C++ compiler (g++) is installed")
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    path = folder / f"kernels-{_key(compiler, sources)}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():  # a process that held the lock before may have made it
            _compile(compiler, sources, path)
    return path


def _compile(compiler: str, sources: list[Path], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        jobs = [
            subprocess.Popen(
                [compiler, *FLAGS, "-c", str(source), "-o", str(target)], stderr=subprocess.PIPE, text=True
            )
            for source, target in zip(sources, objects, strict=True)
        ]
        failures = [errors for job, errors in ((job, job.communicate()[1]) for job in jobs) if job.returncode]
        if failures:
            raise BuildError(f"{compiler} failed: {failures[0].strip()[-2000:]}")
        library = Path(scratch) / "kernels.so"
        linked = subprocess.run(
            [compiler, "-shared", *map(str, objects), "-o", str(library), "-pthread"], capture_output=True, text=True
        )
        if linked.returncode:
            raise BuildError(f"{compiler} failed to link: {linked.stderr.strip()[-2000:]}")
        os.replace(library, path)


def _key(compiler: str, sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for source in [*sources, *sorted(Path(__file__).parent.glob("*.h"))]:
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    for part in (*FLAGS, version, platform.machine(), *cpu_flags()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]
