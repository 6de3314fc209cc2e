"""The file of observed expert loads: written by a running service, read to balance the next one's experts."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ridgewalk.placement.moe_spec import MoESpec


class ExpertLoadError(ValueError):
    """A file of expert loads cannot be used; the message names the file and the reason."""


class ExpertLoad(msgspec.Struct, frozen=True):
    """Tokens that each expert of each sparse layer has computed. Its JSON is the file."""

    model: str  # the served name
    num_experts: int
    layers: list[list[int]]  # [sparse layer][expert]


def read_expert_load(path: Path, moe: MoESpec) -> ExpertLoad:
    """Read the loads of a model of this shape.

    Raises:
        ExpertLoadError: the file is not readable, or of a model with other layers or experts.
    """
    try:
        return _decode(path, path.read_bytes(), moe)
    except OSError as error:
        raise ExpertLoadError(f"expert_load: {path} cannot be read: {error.strerror}") from error
    except ExpertLoadError as error:
        raise ExpertLoadError(f"expert_load: {error}; record it anew") from error


def read_recorded(path: Path, model: str, moe: MoESpec) -> ExpertLoad | None:
    """What a file that loads of ``model`` are to be added to holds already; None where there is none.

    Raises:
        ExpertLoadError: there is something that cannot be added to: unreadable, or of another model or shape.
    """
    try:
        load = _decode(path, path.read_bytes(), moe)
        if load.model != model:
            raise ExpertLoadError(f"{path} is of {load.model}, not of {model}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ExpertLoadError(f"record_expert_load: {path} cannot be read: {error.strerror}") from error
    except ExpertLoadError as error:
        raise ExpertLoadError(f"record_expert_load: {error}; name another file, or remove this one") from error
    return load


def _decode(path: Path, content: bytes, moe: MoESpec) -> ExpertLoad:
    try:
        load = msgspec.json.decode(content, type=ExpertLoad)
    except msgspec.DecodeError as error:
        raise ExpertLoadError(f"{path} is no file of expert loads: {error}") from error
    seen = (len(load.layers), {load.num_experts, *(len(layer) for layer in load.layers)})
    if seen != (len(moe.sparse_layers), {moe.num_experts}):
        raise ExpertLoadError(
            f"{path} is of {load.model} with {len(load.layers)} sparse layers of {load.num_experts} "
            f"experts, but this model has {len(moe.sparse_layers)} of {moe.num_experts}"
        )
    if any(tokens < 0 for layer in load.layers for tokens in layer):
        raise ExpertLoadError(f"{path} has negative numbers of tokens")
    return load


def write_expert_load(path: Path, load: ExpertLoad) -> None:
    """Write the file whole: a reader never sees half of it."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_bytes(msgspec.json.encode(load))
    unfinished.replace(path)
