"""Reads a rank's parameters from safetensors: only the slices that the rank holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch

from ridgewalk.kernels.block_scales import SCALE_SUFFIX, Fp8Weight, Weight, block_range, dequantize, scales_shape
from ridgewalk.model.checkpoint import Checkpoint, CheckpointError, missing_tensor
from ridgewalk.model.sharding import Parameter, TensorSlice
from ridgewalk.model.tensor_rules import Precision, checkpoint_shapes
from ridgewalk.placement.model_spec import ModelSpec

FP8 = "F8_E4M3"


def load_parameters(
    folder: str | Path,
    spec: ModelSpec,
    plan: Mapping[str, Parameter],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Weight]:
    """Read the parameters of one rank. Beside them, one slice at a time takes memory.

    Args:
        folder: holds ``model.safetensors`` or a ``model.safetensors.index.json`` with its files.
        spec: the model, which says what a checkpoint holds for all ranks.
        plan: what to read, from `ridgewalk.model.sharding.shard_plan`.
        dtype: the compute dtype; the checkpoint's is converted, FP8 weights are multiplied with their scales unless
            the plan keeps them.
        device: of the parameters.
        progress: called after each slice with (bytes of parameters filled, bytes to be filled in all).

    Raises:
        CheckpointError: no checkpoint, an unreadable file, a missing tensor or scale, one of another shape, or one
            that the model would not use (the config and the checkpoint then disagree).
    """
    with Checkpoint(folder) as checkpoint:
        _check_names(checkpoint.files, spec)
        parameters = {name: _empty(parameter, dtype, device) for name, parameter in plan.items()}
        pieces = [(parameters[name], piece) for name, parameter in plan.items() for piece in parameter.slices]
        pieces.sort(key=lambda item: checkpoint.files[item[1].tensor])
        total = sum(_num_bytes(target, piece) for target, piece in pieces)
        done = 0
        for target, piece in pieces:
            if isinstance(target, Fp8Weight):
                _copy_blocks(checkpoint, piece, target)
            else:
                _copy(checkpoint, spec.fp8_block, piece, target)
            done += _num_bytes(target, piece)
            if progress is not None:
                progress(done, total)
    return parameters


def _check_names(files: Iterable[str], spec: ModelSpec) -> None:
    found, shapes = set(files), checkpoint_shapes(spec)
    for tensor, shape in shapes.items():
        if tensor not in found:
            raise missing_tensor(tensor, shape)
    unused = found - shapes.keys() - _ignored(found)
    if spec.fp8_block:
        unused -= {tensor + SCALE_SUFFIX for tensor, shape in shapes.items() if len(shape) == 2}
    if unused:
        raise CheckpointError(f"the checkpoint has a tensor {min(unused)} that its config.json does not call for")


def _ignored(tensors: set[str]) -> set[str]:
    """What checkpoints hold beside the model.

    `lm_head` is stored beside tied embeddings by some writers, rotary frequencies by old ones, and DeepSeek-V3 appends
    the layers that predict further tokens, which alone have an `eh_proj`.
    """
    layers = re.compile(r"model\.layers\.\d+\.")
    further = {tensor.removesuffix("eh_proj.weight") for tensor in tensors if tensor.endswith(".eh_proj.weight")}

    def ignored(tensor: str) -> bool:
        layer = layers.match(tensor)
        return tensor == "lm_head.weight" or "rotary_emb" in tensor or (layer is not None and layer[0] in further)

    return {tensor for tensor in tensors if ignored(tensor)}


def _empty(parameter: Parameter, dtype: torch.dtype, device: torch.device) -> Weight:
    if block := parameter.fp8_block:
        *slots, outputs, inputs = parameter.shape
        values = torch.empty(parameter.shape, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty((*slots, *scales_shape((outputs, inputs), block)), device=device)
        return Fp8Weight(values, scales, block)
    kept = torch.float32 if parameter.precision is Precision.FLOAT32 else dtype
    make = torch.empty if _is_covered(parameter) else torch.zeros
    return make(parameter.shape, dtype=kept, device=device)


def _is_covered(parameter: Parameter) -> bool:
    return sum(map(_elements, parameter.slices)) == prod(parameter.shape)


def _elements(piece: TensorSlice) -> int:
    return (piece.stop - piece.start) * prod(piece.shape) // piece.shape[piece.dim]


def _num_bytes(target: Weight, piece: TensorSlice) -> int:
    if not isinstance(target, Fp8Weight):
        return _elements(piece) * target.element_size()
    return _elements(piece) + _elements(_of_scales(piece, target.block)) * target.scales.element_size()


def _of_scales(piece: TensorSlice, block: tuple[int, int]) -> TensorSlice:
    """The scales of a slice that consists of whole blocks."""
    size = block[piece.dim]
    start, stop = block_range(piece.start, piece.stop, size)
    shape = scales_shape(piece.shape, block)
    return TensorSlice(piece.tensor + SCALE_SUFFIX, shape, piece.dim, start, stop, piece.offset // size, piece.slot)


def _ranges(piece: TensorSlice) -> list[tuple[int, int]]:
    ranges = [(0, size) for size in piece.shape]
    ranges[piece.dim] = (piece.start, piece.stop)
    return ranges


def _place(values: torch.Tensor, piece: TensorSlice, target: torch.Tensor) -> None:
    if piece.slot is not None:
        target = target[piece.slot]
    target.narrow(piece.dim, piece.offset, piece.stop - piece.start).copy_(values)


def _copy_blocks(checkpoint: Checkpoint, piece: TensorSlice, target: Fp8Weight) -> None:
    stored = checkpoint.dtype(piece.tensor)
    if stored != FP8:
        raise CheckpointError(
            f"{piece.tensor} is stored as {stored}, but config.json says that it is FP8; "
            "name what is not in modules_to_not_convert"
        )
    for part, held in ((piece, target.values), (_of_scales(piece, target.block), target.scales)):
        _place(checkpoint.read(part.tensor, part.shape, *_ranges(part)), part, held)


def _copy(checkpoint: Checkpoint, block: tuple[int, int] | None, piece: TensorSlice, target: torch.Tensor) -> None:
    if piece.start == piece.stop:
        return
    ranges = _ranges(piece)
    values = checkpoint.read(piece.tensor, piece.shape, *ranges)
    if checkpoint.dtype(piece.tensor) == FP8 or piece.tensor + SCALE_SUFFIX in checkpoint.files:
        values = _scaled(checkpoint, block, piece, values, ranges)
    _place(values, piece, target)


def _scaled(
    checkpoint: Checkpoint,
    block: tuple[int, int] | None,
    piece: TensorSlice,
    values: torch.Tensor,
    ranges: list[tuple[int, int]],
) -> torch.Tensor:
    stored, name = checkpoint.dtype(piece.tensor), piece.tensor + SCALE_SUFFIX
    if block is None:
        raise CheckpointError(f"{piece.tensor} is stored as {stored}, but config.json names no weight_block_size")
    if stored != FP8:
        raise CheckpointError(f"{piece.tensor} is stored as {stored}, but has scales for FP8 in {name}")
    rows, columns = (block_range(*run, size) for run, size in zip(ranges, block, strict=True))
    scales = checkpoint.read(name, scales_shape(piece.shape, block), rows, columns)
    return dequantize(values, scales.to(torch.float32), (ranges[0][0], ranges[1][0]), block)
