"""Reads a rank's parameters from safetensors: only the slices that the rank holds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ridgewalk.model.sharding import Parameter, TensorSlice

INDEX_NAME = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """The checkpoint does not hold what the config promises; the message names the tensor and both shapes."""


def load_parameters(
    folder: str | Path,
    plan: Mapping[str, Parameter],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Read the parameters of one rank.

    Args:
        folder: holds ``model.safetensors`` or a ``model.safetensors.index.json`` with its files.
        plan: what to read, from `ridgewalk.model.sharding.shard_plan`.
        dtype: of the parameters; the checkpoint's is converted.
        device: of the parameters.
        progress: called after each tensor with (elements read, elements in all).

    Raises:
        CheckpointError: no checkpoint, an unreadable file, a missing tensor, one of another shape, or one that the
            model would not use (the config and the checkpoint then disagree).
    """
    files = checkpoint_files(Path(folder))
    _check_names(files, plan)
    wanted: dict[Path, list[tuple[torch.Tensor, TensorSlice]]] = defaultdict(list)
    parameters = {}
    for name, parameter in plan.items():
        covered = sum((s.stop - s.start) for s in parameter.slices)
        whole = covered == parameter.shape[parameter.slices[0].dim]
        make = torch.empty if whole else torch.zeros
        parameters[name] = make(parameter.shape, dtype=dtype, device=device)
        for piece in parameter.slices:
            wanted[files[piece.tensor]].append((parameters[name], piece))
    total, done = sum(p.numel() for p in parameters.values()), 0
    for path, pieces in wanted.items():
        try:
            with safe_open(path, framework="pt") as checkpoint:
                for target, piece in pieces:
                    done += _copy(checkpoint, piece, target, path)
                    if progress is not None:
                        progress(done, total)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return parameters


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint.

    Raises:
        CheckpointError: there is none, or its index is damaged or names a missing file.
    """
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
    single = folder / "model.safetensors"
    if not single.exists():
        raise CheckpointError(f"{folder} has neither model.safetensors nor {INDEX_NAME}")
    try:
        with safe_open(single, framework="pt") as checkpoint:
            return dict.fromkeys(checkpoint.keys(), single)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{single} cannot be read: {error}") from error


def _check_names(files: Mapping[str, Path], plan: Mapping[str, Parameter]) -> None:
    shapes = {piece.tensor: piece.shape for parameter in plan.values() for piece in parameter.slices}
    for tensor, shape in shapes.items():
        if tensor not in files:
            raise CheckpointError(f"the checkpoint has no tensor {tensor}; expected shape {list(shape)}")
    # `lm_head` is stored beside tied embeddings by some writers, rotary frequencies by old ones.
    unused = [name for name in files if name not in shapes and name != "lm_head.weight" and "rotary_emb" not in name]
    if unused:
        raise CheckpointError(f"the checkpoint has a tensor {unused[0]} that its config.json does not call for")


def _copy(checkpoint, piece: TensorSlice, target: torch.Tensor, path: Path) -> int:
    source = checkpoint.get_slice(piece.tensor)
    found = tuple(source.get_shape())
    if found != piece.shape:
        raise CheckpointError(f"{piece.tensor} in {path.name} has shape {list(found)}, expected {list(piece.shape)}")
    count = piece.stop - piece.start
    if count == 0:
        return 0
    values = source[piece.start : piece.stop] if piece.dim == 0 else source[:, piece.start : piece.stop]
    target.narrow(piece.dim, piece.offset if piece.dim == 0 else 0, count).copy_(values)
    return values.numel()
