"""`HardwareSpec`: devices, how fast they are and how they are linked. Read from data files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec
import yaml

from ridgewalk.placement.data_files import shipped_names, shipped_path

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Count = Annotated[int, msgspec.Meta(ge=1)]


class HardwareError(ValueError):
    """There is no such hardware, or its file is wrong; the message says what there is."""


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How devices reach each other."""

    latency_s: _NotNegative  # of a collective of few bytes in a CUDA graph, ranks waiting for each other included
    bandwidth: _Positive  # bytes/s of one device, one way
    reduces_in_switch: bool = False


class HardwareSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of device, in equal nodes. Rates are peaks; what of them is reached are the efficiencies."""

    about: str
    devices_per_node: _Count
    memory_bytes: _Positive  # of one device
    memory_bandwidth: _Positive  # bytes/s
    flops: dict[str, _Positive]  # dense FLOP/s by dtype; float8 where the device multiplies it
    within_node: Link
    between_nodes: Link
    bandwidth_efficiency: _Share
    flops_efficiency: _Share
    link_efficiency: _Share
    stage_overhead_s: _NotNegative  # of handing a step from one pipeline stage to the next, which is busy with it
    layer_overhead_s: _NotNegative  # of one layer in one step: kernels that follow each other
    step_overhead_s: _NotNegative  # of one step on the host: scheduling, input, sampling, messages
    sequence_overhead_s: _NotNegative  # the same, for each sequence of the step
    num_nodes: _Count = 1
    ranks_overhead_s: _NotNegative = 0.0  # of one step on the ranks of one stage, where these are several processes
    sparse_layer_overhead_s: _NotNegative = 0.0  # of a sparse layer in one step, beside `layer_overhead_s`
    expert_fill: _NotNegative = 0.0  # of an expert's product, input columns whose time its kernel takes to get going

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.num_nodes * self.devices_per_node

    @property
    def keeps_fp8(self) -> bool:
        """Whether the devices multiply FP8."""
        return "float8" in self.flops

    def link(self, num_devices: int) -> Link:
        """What joins so many neighbouring devices."""
        return self.within_node if num_devices <= self.devices_per_node else self.between_nodes


def find_hardware(text: str) -> HardwareSpec:
    """``8xh200``, ``2x8xh200`` (nodes x devices x kind), ``h200`` (one), or the path of a file.

    Raises:
        HardwareError: names what there is.
    """
    if text.endswith((".yaml", ".yml")):
        return _read(Path(text).expanduser())
    match = re.fullmatch(r"(?:(?:([1-9]\d*)x)?([1-9]\d*)x)?([a-z][\w.-]*)", text.strip().lower())
    path = shipped_path("hardware", match[3]) if match else None
    if match is None or path is None:
        kinds = ", ".join(shipped_names("hardware"))
        raise HardwareError(
            f"there is no hardware {text!r}; write devices x kind as in 8xh200, nodes x devices x kind as in 2x8xh200 "
            f"(kinds: {kinds}), or the path of a .yaml file"
        )
    spec = _read(path)
    num_nodes, num_devices = int(match[1] or 1), int(match[2] or 1)
    if num_devices > spec.devices_per_node:
        raise HardwareError(
            f"{text!r} puts {num_devices} devices into a node, but a node of {match[3]} holds {spec.devices_per_node}; "
            f"write nodes x devices x kind, as in {-(-num_devices // spec.devices_per_node)}x{spec.devices_per_node}x"
            f"{match[3]}"
        )
    return msgspec.structs.replace(spec, num_nodes=num_nodes, devices_per_node=num_devices)


def _read(path: Path) -> HardwareSpec:
    try:
        return msgspec.convert(yaml.safe_load(path.read_text()), HardwareSpec)
    except OSError as error:
        raise HardwareError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HardwareError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except msgspec.ValidationError as error:
        raise HardwareError(f"{path} describes no hardware: {error}") from None
