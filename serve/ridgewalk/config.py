"""`ServeConfig`: what a user writes in YAML (or as flags), validated once, with errors that name the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ridgewalk.engine.scheduler_config import AdmissionName
from ridgewalk.placement.default_limits import DEFAULT_LIMITS, EngineLimits
from ridgewalk.placement.hardware import Device
from ridgewalk.placement.mesh import Mesh, placement_name
from ridgewalk.routing.decision import RoutingName
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo

LONGEST_STREAM_S = 3600.0
"""Replicas drain, and HAProxy keeps the workers of before a reload, for at least so long."""

_SIZE_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
               "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "k": 2**10, "m": 2**20, "g": 2**30}  # fmt: skip


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the field and the remedy."""


def parse_size(value: object) -> object:
    """Bytes from ``"2GiB"``, ``"500MB"`` or a plain number. Other values are left for the validator to refuse.

    Raises:
        ValueError: a string that is not a size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in _SIZE_UNITS:
        raise ValueError(f"{value!r} is not a size; write it as 2GiB, 512MiB or a number of bytes")
    size = float(match[1]) * _SIZE_UNITS[match[2].lower()]
    if 0 < size < 1:
        raise ValueError(f"{value!r} is less than one byte; write it as 2GiB, 512MiB or a number of bytes")
    return int(size)


def parse_cpus(value: object) -> object:
    """Numbers of CPUs, in order, from ``"0-3,8"`` as `taskset` writes them. Other values are left for the validator.

    Raises:
        ValueError: a string that is not such a list.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        return value
    found: set[int] = set()
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        last = -1 if match is None else int(match[2] or match[1])
        if match is None or last < int(match[1]):
            raise ValueError(f"{value!r} is not a list of CPUs; write it as 0-3 or 0,2,8-11")
        found.update(range(int(match[1]), last + 1))
    return tuple(sorted(found))


CpuNumber = Annotated[int, Field(ge=0)]
Cpus = Annotated[
    tuple[CpuNumber, ...],
    BeforeValidator(parse_cpus),
    Field(min_length=1),
    AfterValidator(lambda numbers: tuple(sorted(set(numbers)))),
]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
SizeOrNothing = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]


def _api_key(key: str) -> str:
    if not key.strip():
        raise ValueError("a key is blank; write one, or leave it out for a service that is open to all")
    return key.strip()


ApiKey = Annotated[str, AfterValidator(_api_key)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
"""What a user writes is relative to where they are; a rank's working directory is elsewhere."""


class PlacementConfig(_Strict):
    """``replicas`` copies of one mesh of ranks."""

    replicas: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    data_parallel_size: int = Field(1, ge=1)  # attention groups of an expert-parallel replica; else more replicas
    enable_expert_parallel: bool = False  # experts over the data- and tensor-parallel ranks of each stage
    num_redundant_experts: int = Field(0, ge=0)  # copies of busy experts, per sparse layer; needs expert_load
    expert_load: AbsolutePath | None = None  # a file of observed loads, by which experts are placed
    record_expert_load: AbsolutePath | None = None  # add to such a file, on the node of the first replica
    memory: Size | None = None  # bytes per rank; None: a share of the machine (CPU) or of the device (GPU)
    num_blocks: int | None = Field(None, ge=1)  # per attention group, instead of a memory budget
    cpus_per_rank: float = Field(1.0, gt=0)  # what a rank asks of Ray's scheduler
    gpus_per_rank: float = Field(0.0, ge=0)  # over 0: the rank runs on CUDA
    threads_per_rank: int | None = Field(None, ge=1)  # None: the host's cores (or `cpus`) over the ranks on it
    cpus: Cpus | None = None  # of its host, on which alone its ranks run, e.g. 0-3; None: all
    peak_flops_per_rank: float | None = Field(None, gt=0, allow_inf_nan=False)  # per second; with it, utilization
    peak_bandwidth_per_rank: Size | None = None  # bytes per second of a rank's memory; with it, utilization

    @model_validator(mode="after")
    def _refuse_what_contradicts(self) -> PlacementConfig:
        for field in ("num_redundant_experts", "expert_load", "record_expert_load"):
            if getattr(self, field) and not self.enable_expert_parallel:
                raise ValueError(f"{field} needs enable_expert_parallel: without it every rank holds all experts")
        if self.num_redundant_experts and self.expert_load is None:
            raise ValueError(
                "num_redundant_experts needs expert_load, the file that says which experts are busy; record one with "
                "record_expert_load"
            )
        if self.memory is not None and self.num_blocks is not None:
            raise ValueError("memory and num_blocks exclude each other; num_blocks states the KV cache directly")
        return self

    @property
    def mesh(self) -> Mesh:
        """Ranks of one replica. Data parallelism without expert parallelism is replicas."""
        expert_parallel = self.enable_expert_parallel
        dp = self.data_parallel_size if expert_parallel else 1
        return Mesh(self.tensor_parallel_size, self.pipeline_parallel_size, dp, expert_parallel)

    @property
    def num_replicas(self) -> int:
        """Replicas, data parallelism without expert parallelism included."""
        return self.replicas * (1 if self.enable_expert_parallel else self.data_parallel_size)

    @property
    def num_ranks(self) -> int:
        """Of all replicas."""
        return self.num_replicas * self.mesh.world_size

    @property
    def name(self) -> str:
        """Placement name, e.g. ``DP2xTP2``."""
        return placement_name(self.num_replicas, self.mesh)


class ModelConfig(_Strict):
    """One served model."""

    model: str = Field(min_length=1)  # a zoo name, a local folder or a hub id
    name: str = ""  # what clients call it; empty: `model` as given (a folder's own name)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int | None = Field(None, ge=2)  # None: what the model was made for
    max_num_seqs: int | None = Field(None, ge=1)  # per attention group; None: 1,024 on GPUs, 256 on CPUs
    max_num_batched_tokens: int | None = Field(None, ge=1)  # likewise; None: 8,192 on GPUs, 2,048 on CPUs
    block_size: int = Field(16, ge=1)
    enable_prefix_caching: bool = True
    admission: AdmissionName = "predictive"  # by the predicted peak of KV use, or by the prompt alone (prompt_only)
    routing: RoutingName = "kv_growth"  # which replica takes a request: see `ridgewalk.routing`
    # Host memory per rank, to which blocks of preempted requests are copied if evicted; None: see `replica.sizing`.
    swap_space: SizeOrNothing | None = None
    slo_ttft_ms: float | None = Field(None, gt=0, allow_inf_nan=False)  # of requests without x-llm-d-slo-ttft-ms
    slo_tpot_ms: float | None = Field(None, gt=0, allow_inf_nan=False)  # of requests without x-llm-d-slo-tpot-ms
    max_waiting: int = Field(2048, ge=1)  # waiting sequences per model; beyond it requests get 429
    workload: str = "reasoning"  # what placements are planned for where none are listed
    placements: list[PlacementConfig] = []  # none: planned when the service starts

    @model_validator(mode="after")
    def _refuse_what_nothing_reads(self) -> ModelConfig:
        if self.swap_space and not self.enable_prefix_caching:
            raise ValueError("swap_space needs enable_prefix_caching: blocks on the host are found by their content")
        if self.slo != NO_SLO and self.routing != "kv_growth":
            raise ValueError(f"slo_ttft_ms and slo_tpot_ms need routing kv_growth; {self.routing} heeds neither")
        return self

    def engine_limits(self, device: Device) -> EngineLimits:
        """``max_num_seqs`` and ``max_num_batched_tokens``, as stated or as the device has them."""
        default = DEFAULT_LIMITS[device]
        return EngineLimits(
            self.max_num_seqs or default.max_num_seqs, self.max_num_batched_tokens or default.max_num_batched_tokens
        )

    @property
    def slo(self) -> LatencySlo:
        """The pace of requests that ask for none."""
        return LatencySlo.of_ms(self.slo_ttft_ms, self.slo_tpot_ms)

    @property
    def served_name(self) -> str:
        """The id in /v1/models."""
        folder = Path(self.model).expanduser()
        return self.name or (folder.resolve().name if folder.is_dir() else "") or self.model


class ServeConfig(_Strict):
    """A whole service: one Serve application."""

    models: list[ModelConfig] = Field(min_length=1)
    host: str = "0.0.0.0"
    port: int = Field(8000, ge=1, le=65535)
    ingress_replicas: int = Field(1, ge=1)
    api_keys: list[ApiKey] = []
    api_key_file: Path | None = None  # one key a line
    max_body_bytes: Size = 16 * 2**20
    app_name: str = Field("ridgewalk", min_length=1)  # of the Serve application
    hardware: str | None = None  # for planning, as `ridgewalk plan` takes it; None: this machine, if calibrated

    @model_validator(mode="after")
    def _refuse_equal_names(self) -> ServeConfig:
        names = [model.served_name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name!r}; give each its own `name`")
        for model in self.models:
            shapes = [placement.name for placement in model.placements]
            if len(set(shapes)) < len(shapes):
                raise ValueError(f"model {model.served_name!r} lists a placement twice; raise its `replicas` instead")
        return self

    @model_validator(mode="after")
    def _refuse_shared_records(self) -> ServeConfig:
        paths = [p.record_expert_load for model in self.models for p in model.placements if p.record_expert_load]
        files = [path.resolve() for path in paths]
        for path, file in zip(paths, files, strict=True):
            if files.count(file) > 1:
                raise ValueError(f"record_expert_load: two placements record to {path}; give each its own file")
        return self

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole service."""
        return sum(p.num_ranks for model in self.models for p in model.placements)

    def num_ranks_bound_to(self, cpus: Sequence[int]) -> int:
        """Ranks of those placements whose `cpus` are some of these."""
        placements = [p for model in self.models for p in model.placements]
        return sum(p.num_ranks for p in placements if not set(p.cpus or ()).isdisjoint(cpus))


def parse_config(data: Any, source: str = "the configuration") -> ServeConfig:
    """Validate plain data.

    Raises:
        ConfigError: one sentence per field that is wrong.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must be a mapping with the key `models`, not {type(data).__name__}")
    try:
        return ServeConfig.model_validate(data)
    except ValidationError as error:
        problems = [f"{_path(item['loc'])}: {_sentence(item)}" for item in error.errors()]
        raise ConfigError(f"{source} is wrong. " + "; ".join(problems)) from None


def load_config(path: Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> ServeConfig:
    """Read a YAML file. ``overrides``: fields of `ServeConfig` that go before the file's.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is wrong.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file") from None
    return parse_config({**data, **overrides} if isinstance(data, dict) else data, str(path))


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "configuration"


def _sentence(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "no such option"
    return str(item["msg"]).removeprefix("Value error, ")
