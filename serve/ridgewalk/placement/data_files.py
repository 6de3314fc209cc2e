"""The data files that ship with the package: devices, shapes of public models, workloads."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).with_name("data")


def shipped_names(kind: str) -> list[str]:
    """Names of the files of a kind: ``hardware``, ``models`` or ``workloads``."""
    return sorted(path.stem for path in (_FOLDER / kind).iterdir() if path.suffix in (".yaml", ".json"))


def shipped_path(kind: str, name: str) -> Path | None:
    """The file of that name, or None."""
    paths = [path for path in (_FOLDER / kind).iterdir() if path.stem == name]
    return paths[0] if paths and name in shipped_names(kind) else None
