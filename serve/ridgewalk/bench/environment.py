"""aiperf in a virtual environment of its own: its many requirements stay out of the service's."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ridgewalk.bench.processes import end_process_tree
from ridgewalk.config import ConfigError

AIPERF_VERSION = "0.13.0"
_OURS = ".ridgewalk"  # written first: no folder without it is ever removed
_WHOLE = ".whole"  # written last: an environment without it was interrupted
_VERSION_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Aiperf:
    """The program that sends the load."""

    program: Path
    version: str


class SetupError(RuntimeError):
    """The environment could not be made; says why and what else can be done."""


def default_folder() -> Path:
    """In ``$XDG_CACHE_HOME/ridgewalk``, by default in ``~/.cache/ridgewalk``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "ridgewalk" / f"aiperf-{AIPERF_VERSION}"


def is_whole(folder: Path) -> bool:
    """An environment is there and was finished."""
    whole = folder / _WHOLE
    return whole.is_file() and whole.read_text() == AIPERF_VERSION and (folder / "bin" / "aiperf").is_file()


def named_aiperf(named: str) -> Aiperf:
    """An aiperf that the user has. Raises ConfigError when there is no such program, or it does not say its version."""
    found = shutil.which(Path(named).expanduser())
    if found is None:
        raise ConfigError(f"--aiperf: {named} is not a program; leave it out and it is installed in a cache")
    program = Path(found).absolute()
    try:
        said = subprocess.run(
            [str(program), "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_VERSION_TIMEOUT_S, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"--aiperf: {named} --version failed ({error}); is it aiperf's program?") from None
    version = re.search(r"\d+\.\d\S*", said)
    if version is None:
        raise ConfigError(f"--aiperf: {named} --version says no version; is it aiperf's program?")
    return Aiperf(program, version[0])


def ensure_aiperf(folder: Path, say: Callable[[str], None]) -> Aiperf:
    """The aiperf of the environment in ``folder``, installed there first unless that was done and finished.

    Of two that come at once, one installs and the other waits.

    Args:
        folder: the virtual environment, e.g. `default_folder`.
        say: is told what happens, a short line at a time.

    Raises:
        SetupError: the installers failed; carries pip's last words.
        ConfigError: the folder is something else than an environment of ours.
    """
    aiperf = Aiperf(folder / "bin" / "aiperf", AIPERF_VERSION)
    with _locked(folder):
        if is_whole(folder):
            return aiperf
        if folder.exists():
            if any(folder.iterdir()) and not (folder / _OURS).is_file():
                raise ConfigError(f"--aiperf-env: {folder} holds something else than aiperf's; name a new folder")
            say("removing a half-made environment")
            shutil.rmtree(folder)
        folder.mkdir()
        (folder / _OURS).touch()
        say(f"making a virtual environment in {folder}")
        venv.create(folder, with_pip=True)
        _install(folder, say)
        (folder / _WHOLE).write_text(AIPERF_VERSION)
    return aiperf


def _install(folder: Path, say: Callable[[str], None]) -> None:
    """By uv, in a tenth of pip's time; by pip where uv does not reach an index, as behind pip's own settings."""
    python, wanted = str(folder / "bin" / "python"), f"aiperf=={AIPERF_VERSION}"
    pip = [python, "-m", "pip", "install", "--no-compile", "--progress-bar", "off"]
    pip += ["--disable-pip-version-check", "--no-input"]
    say("installing uv")
    if not _run([*pip, "uv"], say) and not _run(
        [str(folder / "bin" / "uv"), "pip", "install", "--python", python, "--no-progress", wanted], say
    ):
        return
    if why := _run([*pip, wanted], say):
        raise SetupError(
            f"aiperf {AIPERF_VERSION} could not be installed in {folder}: {why}; let pip reach a package index "
            f"(PIP_INDEX_URL), or name an aiperf that you have with --aiperf (Python {sys.version_info[0]}."
            f"{sys.version_info[1]}: pip install aiperf=={AIPERF_VERSION})"
        )


def _run(command: list[str], say: Callable[[str], None]) -> str | None:
    """Run an installer and pass on what it does; why it failed, or None."""
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
            elif line.lower().startswith("error:"):
                errors.append(line[len("error:") :].strip())
        status = process.wait()
    finally:
        end_process_tree(process)
    if not status:
        return None
    return errors[-1] if errors else f"the installer ended with status {status}"


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
