"""The Serve application: ``serve run ridgewalk.app:build model=demo-dense``, and what ``ridgewalk serve`` runs."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from ridgewalk.api.ingress import INGRESS_NAME, Ingress, IngressModel, IngressSettings
from ridgewalk.api.served_model import ModelFolderError, load_served_model
from ridgewalk.config import (
    LONGEST_STREAM_S,
    ConfigError,
    ModelConfig,
    PlacementConfig,
    ServeConfig,
    load_config,
    parse_config,
)
from ridgewalk.model_source import find_model
from ridgewalk.placement.expert_load import read_expert_load, read_recorded
from ridgewalk.placement.expert_map import balanced_expert_map, imbalance, uniform_expert_map
from ridgewalk.placement.hardware import Device
from ridgewalk.placement.memory import MemoryPlan, MemoryPlanError
from ridgewalk.placement.model_spec import ModelSpec, validate_mesh
from ridgewalk.placement.moe_spec import MoESpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.engine_replica import EngineReplica
from ridgewalk.replica.host import check_cpus, memory_bytes
from ridgewalk.replica.sizing import size_cache
from ridgewalk.routing.decision import RoutingName
from ridgewalk.routing.latency_slo import LatencySlo

logger = logging.getLogger(__name__)

REPLICA_CPUS = 0.5
INGRESS_CPUS = 0.5
_ROUTER = RequestRouterConfig(request_router_class="ridgewalk.replica.pinned_router.PinnedRouter")
_UNLIMITED = 1_000_000  # Serve's own limit; the scheduler's waiting queue is the real one
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
_ONE_EVENT_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""For the ingress, which never blocks: by default every chunk of every stream crosses between two threads."""


@dataclass(frozen=True)
class PlannedPlacement:
    """One placement, checked and resolved: what the deployment will be told."""

    deployment: str
    replicas: int
    engine: EngineConfig
    memory_plan: MemoryPlan | None  # None when only the ranks' own devices can tell


@dataclass(frozen=True)
class PlannedModel:
    """One model, resolved."""

    name: str
    path: Path
    max_model_len: int
    routing: RoutingName
    slo: LatencySlo
    placements: list[PlannedPlacement]


@dataclass(frozen=True)
class _Hosts:
    """What is known of those that share a service's ranks."""

    config: ServeConfig
    count: int
    memory: int | None  # bytes, of the poorest

    @property
    def are_this_machine(self) -> bool:
        """Everything runs here."""
        return self.memory is not None

    @property
    def ranks_per_host(self) -> int:
        """Of the whole service, at most."""
        return math.ceil(self.config.num_ranks / self.count)

    def ranks_on(self, cpus: Sequence[int]) -> int:
        """Of those bound to some of these CPUs, at most on one host."""
        return math.ceil(self.config.num_ranks_bound_to(cpus) / self.count)


def resolve(config: ServeConfig, cluster_hosts: int | None = None) -> list[PlannedModel]:
    """Find every model, read its files and the keys, and check that it can run where it shall: before anything starts.

    ``cluster_hosts``: how many hosts of a cluster share the ranks. Their memory is theirs to know, so only what the
    configuration itself states is checked. None: everything runs on this machine, and must fit in its memory.

    Raises:
        ConfigError: a model is missing, not supported, or does not fit, or a file cannot be read; the message names
            the field and the remedy.
    """
    read_api_keys(config)
    hosts = _Hosts(config, cluster_hosts or 1, memory_bytes() if cluster_hosts is None else None)
    return [_resolve_model(model, hosts) for model in config.models]


def build_application(config: ServeConfig, models: list[PlannedModel]) -> Application:
    """One Ingress deployment over one EngineReplica deployment per (model, placement)."""
    handles = {
        model.name: {placement.engine.placement: _engine(placement) for placement in model.placements}
        for model in models
    }
    settings = IngressSettings(
        [_ingress_model(model) for model in models],
        read_api_keys(config),
        config.max_body_bytes,
    )
    ingress = serve.deployment(
        name=INGRESS_NAME,
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=_UNLIMITED,
        ray_actor_options={"num_cpus": INGRESS_CPUS, "runtime_env": {"env_vars": _ONE_EVENT_LOOP}},
        graceful_shutdown_timeout_s=LONGEST_STREAM_S,
        logging_config=_QUIET,
        max_constructor_retry_count=1,
    )(serve.ingress()(Ingress))
    return ingress.bind(settings, handles)


def build(args: dict[str, Any]) -> Application:
    """Builder for ``serve run`` and Serve config files.

    ``args`` is a `ServeConfig` as plain data, or ``{"config": FILE}``, or the short form ``{"model": NAME}`` with any
    fields of a model and of a placement. Numbers and booleans may be strings, as a command line gives them.

    Raises:
        ConfigError: as `resolve`.
    """
    if "config" in args:
        others = ", ".join(sorted(args.keys() - {"config"}))
        if others:
            raise ConfigError(f"{others} cannot be used together with config; write it into {args['config']}")
        config = load_config(Path(args["config"]))
    else:
        config = parse_config(_expand(args), "args")
    config = with_placements(config, False, logger.info)
    return build_application(config, resolve(config, num_cluster_hosts() if ray.is_initialized() else 1))


def with_placements(config: ServeConfig, on_this_machine: bool, tell: Callable[[str], None]) -> ServeConfig:
    """``config`` with placements for the models that list none; ``tell`` gets a sentence for each.

    Raises:
        ConfigError: as `ridgewalk.planning.startup.plan_missing`.
    """
    if all(model.placements for model in config.models):
        return config
    from ridgewalk.planning.startup import plan_missing  # the simulator: not for those who state theirs

    planned = plan_missing(config, on_this_machine)
    for sentence in planned.sentences:
        tell(sentence)
    return planned.config


def num_cluster_hosts() -> int:
    """Hosts of the cluster that Ray is connected to, as far as they have CPUs to give. At least 1."""
    return max(1, sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")))


def read_api_keys(config: ServeConfig) -> list[str]:
    """Keys of the configuration and of its key file, one a line.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    keys = list(config.api_keys)
    if config.api_key_file is not None:
        try:
            lines = config.api_key_file.read_text().splitlines()
        except OSError as error:
            raise ConfigError(f"api_key_file: cannot read {config.api_key_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"api_key_file: {config.api_key_file} is not text; write one key a line") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"api_key_file: {config.api_key_file} holds no key; write one a line")
        keys += found
    return keys


def needed_cpus(config: ServeConfig) -> float:
    """What the service asks of Ray's scheduler, in logical CPUs."""
    engines = sum(
        placement.num_replicas * (REPLICA_CPUS + placement.mesh.world_size * placement.cpus_per_rank)
        for model in config.models
        for placement in model.placements
    )
    return engines + config.ingress_replicas * INGRESS_CPUS


def needed_gpus(config: ServeConfig) -> float:
    """What the service asks of Ray's scheduler, in GPUs."""
    return sum(
        placement.num_ranks * placement.gpus_per_rank for model in config.models for placement in model.placements
    )


def _expand(args: dict[str, Any]) -> dict[str, Any]:
    """The short form as a full configuration."""
    if "models" in args or "model" not in args:
        return args
    rest = dict(args)
    placement = {key: rest.pop(key) for key in list(rest) if key in PlacementConfig.model_fields}
    model = {key: rest.pop(key) for key in list(rest) if key in ModelConfig.model_fields}
    if placement:
        model["placements"] = [placement]
    return {**rest, "models": [model]}


def _resolve_model(model: ModelConfig, hosts: _Hosts) -> PlannedModel:
    path = find_model(model.model)
    name = model.served_name
    try:
        spec = ModelSpec.from_folder(path)
        max_model_len = model.max_model_len or spec.max_position_embeddings
        if max_model_len > spec.max_position_embeddings:
            raise ConfigError(
                f"max_model_len {max_model_len} is over the {spec.max_position_embeddings} positions the model was "
                "made for; lower it"
            )
        num_replicas = sum(placement.num_replicas for placement in model.placements)
        placements = [
            _resolve_placement(model, name, path, spec, max_model_len, placement, num_replicas, hosts)
            for placement in model.placements
        ]
        load_served_model(name, path, max_model_len=max_model_len)  # what the ingress will read
    except ModelFolderError as error:
        raise ConfigError(str(error)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name}: {error}") from None
    return PlannedModel(name, path, max_model_len, model.routing, model.slo, placements)


def _resolve_placement(
    model: ModelConfig,
    name: str,
    path: Path,
    spec: ModelSpec,
    max_model_len: int,
    placement: PlacementConfig,
    num_replicas: int,
    hosts: _Hosts,
) -> PlannedPlacement:
    mesh = placement.mesh
    validate_mesh(spec, mesh, placement.num_redundant_experts)
    expert_map, expert_imbalance = _place_experts(spec, placement)
    device: Device = "cuda" if placement.gpus_per_rank > 0 else "cpu"
    limits = model.engine_limits(device)
    if placement.cpus is not None and hosts.are_this_machine:
        check_cpus(placement.cpus)
    record = placement.record_expert_load
    if record is not None and spec.moe is not None:
        _check_record(record, name, spec.moe, is_this_machines=hosts.are_this_machine)
    engine = EngineConfig(
        model_name=name,
        placement=placement.name,
        model_path=str(path),
        dtype=spec.dtype if model.dtype == "auto" else model.dtype,
        tp=mesh.tp,
        pp=mesh.pp,
        dp=mesh.dp,
        expert_parallel=mesh.expert_parallel,
        num_redundant_experts=placement.num_redundant_experts,
        expert_map=expert_map,
        expert_imbalance=expert_imbalance,
        record_expert_load=None if record is None else str(record),
        max_model_len=max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        block_size=model.block_size,
        enable_prefix_caching=model.enable_prefix_caching,
        admission=model.admission,
        max_waiting=max(1, model.max_waiting // num_replicas),
        memory=placement.memory,
        num_blocks=placement.num_blocks,
        swap_space=model.swap_space,
        device=device,
        cpus_per_rank=placement.cpus_per_rank,
        gpus_per_rank=placement.gpus_per_rank,
        threads_per_rank=placement.threads_per_rank,
        cpus=placement.cpus,
        ranks_on_cpus=hosts.ranks_on(placement.cpus or ()),
        peak_flops_per_rank=placement.peak_flops_per_rank,
        peak_bandwidth_per_rank=placement.peak_bandwidth_per_rank,
        ranks_per_host=hosts.ranks_per_host,
    )
    plan = None
    available = hosts.memory if engine.device == "cpu" else None
    if available is not None or engine.memory is not None or engine.num_blocks is not None:
        plan = _size_cache(engine, spec, available)
        engine.scheduler_config(plan)  # refuses limits that cannot work
    return PlannedPlacement(_deployment_name(name, placement.name), placement.num_replicas, engine, plan)


def _size_cache(engine: EngineConfig, spec: ModelSpec, available: int | None) -> MemoryPlan:
    """Whether devices multiply FP8 only the ranks can tell: what fits in neither way is refused now.

    Either may take more: BF16 has twice the weights, FP8 room for dequantizing what is not whole blocks.
    """
    if engine.device == "cuda" and spec.fp8_block is not None:
        try:
            return size_cache(engine, spec, available, keeps_fp8=True)
        except MemoryPlanError:
            pass
    return size_cache(engine, spec, available)


def _check_record(path: Path, name: str, moe: MoESpec, *, is_this_machines: bool) -> None:
    """Refuse a file that loads cannot be added to. One on a node of a cluster is that node's to look at."""
    if path.is_dir():
        raise ConfigError(f"record_expert_load: {path} is a directory; name a file in it")
    if not is_this_machines:
        return
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"record_expert_load: there is no directory {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"record_expert_load: {folder} cannot be written; make it writable or name a file elsewhere")
    read_recorded(path, name, moe)


def _place_experts(
    spec: ModelSpec, placement: PlacementConfig
) -> tuple[list[list[list[int]]] | None, tuple[float, float] | None]:
    """The expert map by observed loads, and the worst layer's imbalance at these: uniform, and with the map."""
    if placement.expert_load is None or spec.moe is None:
        return None, None
    ep = placement.mesh.dp * placement.mesh.tp
    loads = read_expert_load(placement.expert_load, spec.moe).layers
    balanced = balanced_expert_map(spec.moe, ep, placement.num_redundant_experts, loads)
    worst = [max(imbalance(chosen, loads)) for chosen in (uniform_expert_map(spec.moe, ep), balanced)]
    return [[list(slots) for slots in layer] for layer in balanced.layers], (worst[0], worst[1])


def _ingress_model(model: PlannedModel) -> IngressModel:
    num_replicas = {placement.engine.placement: placement.replicas for placement in model.placements}
    return IngressModel(model.name, str(model.path), model.max_model_len, num_replicas, model.routing, model.slo)


def _deployment_name(model: str, placement: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', model)}-{placement}"


def _engine(placement: PlannedPlacement) -> Application:
    engine = placement.engine
    group = {"CPU": engine.tp * engine.cpus_per_rank}
    if engine.gpus_per_rank > 0:
        group["GPU"] = engine.tp * engine.gpus_per_rank
    deployment = serve.deployment(
        name=placement.deployment,
        num_replicas=placement.replicas,
        max_ongoing_requests=_UNLIMITED,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        # One bundle per stage and tensor-parallel group: a bundle is never split over nodes.
        placement_group_bundles=[{"CPU": REPLICA_CPUS}, *[group] * (engine.dp * engine.pp)],
        placement_group_strategy="PACK",
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=LONGEST_STREAM_S,
        request_router_config=_ROUTER,
        logging_config=_QUIET,
        max_constructor_retry_count=1,  # what fails at first (a checkpoint, too little memory) fails again
    )(EngineReplica)
    return deployment.bind(engine)
