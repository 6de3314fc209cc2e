"""aiperf in a virtual environment of its own: its many requirements stay out of the service's."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ridgewalk.bench.processes import end_process_tree
from ridgewalk.config import ConfigError

AIPERF_VERSION = "0.13.0"
_WHOLE = ".whole"  # written last: an environment without it was interrupted


class SetupError(RuntimeError):
    """The environment could not be made; says why and what else can be done."""


def cache_folder() -> Path:
    """Where environments are kept: ``$XDG_CACHE_HOME/ridgewalk``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ridgewalk"


def named_aiperf(named: str) -> Path:
    """An aiperf that the user has. Raises ConfigError when there is no such program."""
    found = shutil.which(Path(named).expanduser())
    if found is None:
        raise ConfigError(f"--aiperf: {named} is not a program; leave it out and it is installed in a cache")
    return Path(found).absolute()


def ensure_aiperf(folder: Path | None, say: Callable[[str], None]) -> Path:
    """The aiperf of ``folder`` (default: in the cache), installed there first unless that was done and finished.

    Of two that come at once, one installs and the other waits.

    Args:
        folder: the virtual environment.
        say: is told what happens, a short line at a time.

    Raises:
        SetupError: pip failed; carries its last words.
        ConfigError: the folder is something else than an environment of ours.
    """
    folder = folder or cache_folder() / f"aiperf-{AIPERF_VERSION}"
    with _locked(folder):
        whole = folder / _WHOLE
        if whole.is_file() and whole.read_text() == AIPERF_VERSION and (folder / "bin" / "aiperf").is_file():
            return folder / "bin" / "aiperf"
        if folder.exists():
            if any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
                raise ConfigError(f"--aiperf-env: {folder} is not a virtual environment; name another folder")
            say("removing a half-made environment")
            shutil.rmtree(folder)
        say(f"making a virtual environment in {folder}")
        venv.create(folder, with_pip=True)
        _install(folder, say)
        whole.write_text(AIPERF_VERSION)
    return folder / "bin" / "aiperf"


def _install(folder: Path, say: Callable[[str], None]) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-compile", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--no-input", f"aiperf=={AIPERF_VERSION}"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    errors: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if words[:1] in (["Collecting"], ["Downloading"], ["Installing"]):
                say(f"{words[0].lower()} {words[1].split('/')[-1]}" if words[0] != "Installing" else "installing")
            elif line.startswith("ERROR:"):
                errors.append(line.removeprefix("ERROR:").strip())
        status = process.wait()
    finally:
        end_process_tree(process)
    if status:
        why = errors[-1] if errors else f"pip ended with status {status}"
        raise SetupError(
            f"aiperf {AIPERF_VERSION} could not be installed in {folder}: {why}; let pip reach a package index "
            f"(PIP_INDEX_URL), or name an aiperf that you have with --aiperf (Python {sys.version_info[0]}."
            f"{sys.version_info[1]}: pip install aiperf=={AIPERF_VERSION})"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{folder.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(f"--aiperf-env: {folder} cannot be made: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
