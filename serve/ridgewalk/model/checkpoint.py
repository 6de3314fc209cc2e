"""`Checkpoint`: the tensors of a model folder, in one safetensors file or many, of which slices are read."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class CheckpointError(ValueError):
    """The checkpoint does not hold what the config promises; the message names the tensor and both shapes."""


class Checkpoint:
    """Opens files when something is first read of them, and closes them at the end of its ``with`` block.

    Attributes:
        files: the file of each tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        """List the tensors.

        Raises:
            CheckpointError: there is no checkpoint, or its index is damaged or names a missing file.
        """
        self.files = _checkpoint_files(Path(folder))
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def dtype(self, tensor: str) -> str:
        """The stored dtype in safetensors' name: ``F32``, ``BF16``, ``F8_E4M3`` ...

        Raises:
            CheckpointError: the tensor is missing or its file unreadable.
        """
        return str(self._find(tensor, None).get_dtype())

    def read(self, tensor: str, shape: tuple[int, ...], *ranges: tuple[int, int]) -> torch.Tensor:
        """A slice of a tensor, in the stored dtype.

        Args:
            tensor: its name.
            shape: that the whole tensor shall have.
            ranges: ``(start, stop)`` of the leading axes; axes without one are read whole.

        Raises:
            CheckpointError: the tensor is missing or has another shape, or its file is unreadable.
        """
        source = self._find(tensor, shape)
        found = tuple(source.get_shape())
        if found != shape:
            place = self.files[tensor].name
            raise CheckpointError(f"{tensor} in {place} has shape {list(found)}, expected {list(shape)}")
        try:
            values: torch.Tensor = source[tuple(slice(start, stop) for start, stop in ranges)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.files[tensor]} cannot be read: {error}") from error
        return values

    def _find(self, tensor: str, shape: tuple[int, ...] | None) -> Any:
        path = self.files.get(tensor)
        if path is None:
            raise missing_tensor(tensor, shape)
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            return self._open[path].get_slice(tensor)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def missing_tensor(tensor: str, shape: tuple[int, ...] | None) -> CheckpointError:
    """The error that a tensor is not in the checkpoint."""
    expected = "" if shape is None else f"; expected shape {list(shape)}"
    return CheckpointError(f"the checkpoint has no tensor {tensor}{expected}")


def _checkpoint_files(folder: Path) -> dict[str, Path]:
    index = folder / INDEX_NAME
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}") from error
        missing = sorted({name for name in weight_map.values() if not (folder / name).exists()})
        if missing:
            raise CheckpointError(f"{folder} lacks {missing[0]}, which its index names")
        return {tensor: folder / name for tensor, name in weight_map.items()}
    single = folder / SINGLE_NAME
    if not single.exists():
        raise CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}")
    try:
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{single} cannot be read: {error}") from error
