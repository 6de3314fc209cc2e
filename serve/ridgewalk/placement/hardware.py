"""`HardwareSpec`: devices, how fast they are and how they are linked. Read from data files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from ridgewalk.machine import calibration_path
from ridgewalk.placement.data_files import shipped_names, shipped_path

Device = Literal["cuda", "cpu"]

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Count = Annotated[int, msgspec.Meta(ge=1)]

THIS_MACHINE = "this-machine"


class HardwareError(ValueError):
    """There is no such hardware, or its file is wrong; the message says what there is."""


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How devices reach each other."""

    latency_s: _NotNegative  # of a collective of few bytes in a CUDA graph, ranks waiting for each other included
    bandwidth: _Positive  # bytes/s of one device, one way
    reduces_in_switch: bool = False


class RankRates(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one rank has of a machine whose cores, caches and memory bandwidth its ranks divide."""

    memory_bandwidth: _Positive
    flops: dict[str, _Positive]
    product_shares: dict[str, dict[int, _Share]]
    attention_bandwidth: dict[str, dict[int, _Positive]]
    attention_flops: dict[str, _Positive]
    latent_attention_flops: dict[str, _Positive]
    layer_overhead_s: _NotNegative
    value_overhead_s: _NotNegative
    step_overhead_s: _NotNegative
    sequence_overhead_s: _NotNegative
    sparse_layer_overhead_s: _NotNegative
    expert_flops: dict[str, dict[int, _Positive]]
    expert_fill: _NotNegative


class HardwareSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of device, in equal nodes. Rates are peaks; what of them is reached are the efficiencies."""

    about: str
    devices_per_node: _Count
    memory_bytes: _Positive  # of one device
    memory_bandwidth: _Positive  # bytes/s
    flops: dict[str, _Positive]  # dense FLOP/s by dtype; float8 where the device multiplies it
    within_node: Link | None  # None: a node has one device
    bandwidth_efficiency: _Share
    flops_efficiency: _Share
    link_efficiency: _Share
    stage_overhead_s: _NotNegative  # of handing a step from one pipeline stage to the next, which is busy with it
    layer_overhead_s: _NotNegative  # of one layer in one step: kernels that follow each other
    step_overhead_s: _NotNegative  # of one step on the host: scheduling, input, sampling, messages
    sequence_overhead_s: _NotNegative  # the same, for each sequence of the step
    between_nodes: Link | None = None  # None: there is one node
    num_nodes: _Count = 1
    ranks_overhead_s: _NotNegative = 0.0  # of one step on the ranks of one stage, where these are several processes
    sparse_layer_overhead_s: _NotNegative = 0.0  # of a sparse layer in one step, beside `layer_overhead_s`
    expert_fill: _NotNegative = 0.0  # of an expert's product, input columns whose time its kernel takes to get going
    device: Device = "cuda"

    # What `ridgewalk calibrate` adds: where kernels are far from the roofline, and ranks are not alone on a machine.
    all_to_all: Link | None = None  # within a node; None: as any collective
    product_shares: dict[str, dict[int, _Share]] = {}  # of `flops`, by dtype and rows of the product; none: all
    expert_flops: dict[str, dict[int, _Positive]] = {}  # FLOP/s of experts without `expert_fill`, by dtype and rows of
    # each; none: as any product
    attention_bandwidth: dict[str, dict[int, _Positive]] = {}  # bytes/s of KV that decode reads, by dtype and query
    # heads per KV head; none: the memory's
    attention_flops: dict[str, _Positive] = {}  # FLOP/s of attention of a prompt; none: as products
    latent_attention_flops: dict[str, _Positive] = {}  # the same over latents (MLA), decode too
    straggle: _NotNegative = 0.0  # of what ranks compute between two collectives: by how much the last of a node's
    # ranks takes longer than a rank does alone. Fewer ranks wait less, as the expected maximum of so many normals
    value_overhead_s: _NotNegative = (
        0.0  # of one value of a token's hidden state in one layer: norms, rotation, activation
    )
    host_shares_cores: bool = False  # what the host does takes the ranks' time: scheduling ahead cannot hide it
    memory_share: _Share | None = None  # of the memory, for ranks; None: the policy's
    process_bytes: _NotNegative = 0  # of that share, taken by a rank's process before it holds anything of a model
    by_ranks: dict[Annotated[int, msgspec.Meta(ge=1)], RankRates] = {}  # with fewer ranks in a node than devices:
    # rates of each by their number. Then a rank may have several devices (cores). None: each has one to itself

    def __post_init__(self) -> None:
        """Check what fields together mean."""
        if self.devices_per_node > 1 and self.within_node is None:
            raise ValueError("several devices_per_node need within_node")
        if self.num_nodes > 1 and self.between_nodes is None:
            raise ValueError("several nodes need between_nodes")

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.num_nodes * self.devices_per_node

    @property
    def keeps_fp8(self) -> bool:
        """Whether the devices multiply FP8."""
        return "float8" in self.flops

    def link(self, num_devices: int) -> Link:
        """What joins so many neighbouring devices.

        Raises:
            HardwareError: there are not so many.
        """
        link = self.within_node if num_devices <= self.devices_per_node else self.between_nodes
        if link is None:
            raise HardwareError(f"nothing is known of a link between {num_devices} devices of {self.about}")
        return link

    def rank_budget(self, default_share: float) -> int:
        """Bytes that a rank may use for a model; ``default_share`` of its memory unless the hardware says otherwise."""
        share = default_share if self.memory_share is None else self.memory_share
        return max(0, int(self.memory_bytes * share - self.process_bytes))

    def shared_by(self, num_ranks: int, num_replicas: int | None = None) -> HardwareSpec:
        """The hardware as each of so many ranks has it, where fewer ranks than devices have more each.

        Rates are those measured with as many ranks, or with the next greater number that was measured.

        Args:
            num_ranks: on all of it.
            num_replicas: that these form; None: each rank is one. What the host does beside them is as measured with
                so many replicas of one rank: each has a scheduler.
        """
        if num_replicas is not None and num_replicas < num_ranks:
            host = self.shared_by(num_replicas)
            return msgspec.structs.replace(
                self.shared_by(num_ranks),
                step_overhead_s=host.step_overhead_s,
                sequence_overhead_s=host.sequence_overhead_s,
            )
        if self.device == "cpu" and num_ranks > self.num_devices:  # ranks can share a core, and all share the memory
            return msgspec.structs.replace(self, memory_bytes=self.memory_bytes * self.num_devices / num_ranks)
        if not self.by_ranks or num_ranks >= self.num_devices:
            return self
        measured = min((count for count in self.by_ranks if count >= num_ranks), default=None)
        rates = {} if measured is None else msgspec.structs.asdict(self.by_ranks[measured])
        memory = self.memory_bytes * self.num_devices / num_ranks
        return msgspec.structs.replace(self, **rates, memory_bytes=memory)


def find_hardware(text: str) -> HardwareSpec:
    """``8xh200``, ``2x8xh200`` (nodes x devices x kind), ``h200`` (one), ``this-machine``, or the path of a file.

    Raises:
        HardwareError: names what there is.
    """
    if text.endswith((".yaml", ".yml")):
        return _read(Path(text).expanduser(), "if `ridgewalk calibrate` wrote it, let it write it again")
    if text.strip().lower() == THIS_MACHINE:
        if not calibration_path().exists():
            raise HardwareError(f"{THIS_MACHINE} has not been measured; run `ridgewalk calibrate` once")
        return _read(calibration_path(), "run `ridgewalk calibrate` again")
    match = re.fullmatch(r"(?:(?:([1-9]\d*)x)?([1-9]\d*)x)?([a-z][\w.-]*)", text.strip().lower())
    path = shipped_path("hardware", match[3]) if match else None
    if match is None or path is None:
        kinds = ", ".join(shipped_names("hardware"))
        raise HardwareError(
            f"there is no hardware {text!r}; write devices x kind as in 8xh200, nodes x devices x kind as in 2x8xh200 "
            f"(kinds: {kinds}), {THIS_MACHINE}, or the path of a .yaml file"
        )
    spec = _read(path, "install ridgewalk again")
    num_nodes, num_devices = int(match[1] or 1), int(match[2] or 1)
    if num_devices > spec.devices_per_node:
        raise HardwareError(
            f"{text!r} puts {num_devices} devices into a node, but a node of {match[3]} holds {spec.devices_per_node}; "
            f"write nodes x devices x kind, as in {-(-num_devices // spec.devices_per_node)}x{spec.devices_per_node}x"
            f"{match[3]}"
        )
    return msgspec.structs.replace(spec, num_nodes=num_nodes, devices_per_node=num_devices)


def _read(path: Path, remedy: str) -> HardwareSpec:
    try:
        return msgspec.convert(yaml.safe_load(path.read_text()), HardwareSpec)
    except OSError as error:
        raise HardwareError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HardwareError(f"{path} is not YAML: {' '.join(str(error).split())}; {remedy}") from None
    except msgspec.ValidationError as error:
        raise HardwareError(f"{path} describes no hardware: {error}; {remedy}") from None
