"""Placements of models for which the configuration lists none: planned when the service starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ridgewalk.bench.profiles import PROFILES
from ridgewalk.bench.workload import sample_requests
from ridgewalk.config import ConfigError, ModelConfig, PlacementConfig, ServeConfig
from ridgewalk.model_source import find_model
from ridgewalk.placement.hardware import THIS_MACHINE, HardwareError, HardwareSpec, find_hardware
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.planning.planner import Candidate, all_placements, dtype_problem, evaluate, rank
from ridgewalk.planning.policy import POLICIES
from ridgewalk.planning.report import placement_fields
from ridgewalk.planning.simulator import Arrival, Scene
from ridgewalk.planning.verdict import reason

REQUESTS_PER_DEVICE = 64
"""At once: enough that KV capacity decides where it is scarce, few enough that planning takes seconds."""


@dataclass(frozen=True)
class Planned:
    """A configuration with a placement for every model, and what there is to say about those that were planned."""

    config: ServeConfig
    sentences: list[str]


def plan_missing(config: ServeConfig, on_this_machine: bool) -> Planned:
    """Choose placements for the models that list none.

    They share the devices that the listed placements leave, in equal parts. Without knowledge of the hardware (none
    stated, and this machine not calibrated, or the service runs elsewhere) a model gets one rank.

    Args:
        on_this_machine: the ranks will run here, so that a calibration of this machine holds.

    Raises:
        ConfigError: the hardware or workload is not known, or nothing fits; names the field.
    """
    missing = [model for model in config.models if not model.placements]
    if not missing:
        return Planned(config, [])
    for model in missing:
        if model.workload not in PROFILES:
            raise ConfigError(f"workload: there is no workload {model.workload!r}; there are {', '.join(PROFILES)}")
    hardware = _hardware(config, on_this_machine)
    sentences: list[str] = []
    models = []
    for model in config.models:
        if not model.placements:
            placements, sentence = (
                _one_rank(model) if hardware is None else _plan(config, model, len(missing), hardware)
            )
            sentences.append(sentence)
            model = model.model_copy(update={"placements": placements})
        models.append(model)
    return Planned(config.model_copy(update={"models": models}), sentences)


def _hardware(config: ServeConfig, on_this_machine: bool) -> HardwareSpec | None:
    if config.hardware is None and not on_this_machine:
        return None
    try:
        return find_hardware(config.hardware or THIS_MACHINE)
    except HardwareError as error:
        if config.hardware is None:
            return None  # nobody asked for it: one rank will do
        raise ConfigError(f"hardware: {error}") from None


def _one_rank(model: ModelConfig) -> tuple[list[PlacementConfig], str]:
    return [PlacementConfig.model_validate({})], (
        f"{model.served_name}: one rank, for nothing says how fast the hardware is; `ridgewalk calibrate` measures "
        "this machine, `hardware` names another, and placements can be stated"
    )


def _plan(
    config: ServeConfig, model: ModelConfig, num_sharing: int, hardware: HardwareSpec
) -> tuple[list[PlacementConfig], str]:
    scene = _scene(model, hardware)
    num_devices = (hardware.num_devices - config.num_ranks) // num_sharing
    if hardware.device == "cpu":
        num_devices = max(1, num_devices)  # ranks can share a core
        # Cores and memory are divided among all ranks of the machine, whoever's they are.
        scene = replace(scene, other_ranks=config.num_ranks + (num_sharing - 1) * num_devices)
    if num_devices < 1:
        raise ConfigError(
            f"models: the listed placements take {config.num_ranks} of {hardware.num_devices} devices, which leaves "
            f"none for {model.served_name}; state its placements"
        )
    ranked = rank(evaluate(scene, all_placements(hardware, num_devices, scene.spec), needed=()), "throughput")
    best = ranked[0]
    if best.outcome is None:
        raise ConfigError(f"models: no placement of {model.served_name} fits; {best.placement.name}: {best.problem}")
    placements = [
        PlacementConfig.model_validate(placement_fields(shape, hardware.device)) for shape in best.placement.shapes
    ]
    return placements, f"{model.served_name}: {_explain(ranked, model.workload)}"


def _explain(ranked: list[Candidate], workload: str) -> str:
    best = ranked[0]
    told = f"{best.placement.name} of {len(ranked)} placements for {workload}; {reason(best, best)}"
    return told if len(ranked) < 2 else f"{told}. {ranked[1].placement.name}: {reason(ranked[1], best)}"


def _scene(model: ModelConfig, hardware: HardwareSpec) -> Scene:
    try:
        spec = ModelSpec.from_folder(find_model(model.model))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {model.served_name}: {error}") from None
    if model.dtype != "auto":
        spec = replace(spec, dtype=model.dtype)
    problem = dtype_problem(hardware, spec.dtype)
    if problem:
        raise ConfigError(f"hardware: for {model.served_name} it {problem}")
    policy = replace(POLICIES["ridgewalk"], **model.engine_limits(hardware.device)._asdict(), admission=model.admission)
    return Scene(spec, hardware, policy, _load(model, spec, REQUESTS_PER_DEVICE * hardware.num_devices))


def _load(model: ModelConfig, spec: ModelSpec, count: int) -> tuple[Arrival, ...]:
    """Requests of the model's workload, all lengths scaled so that the longest fits the context."""
    shapes = sample_requests(PROFILES[model.workload], count, seed=0)
    context = model.max_model_len or spec.max_position_embeddings
    # A scene's context is its longest prompt and its longest output, of whichever requests.
    longest = max(shape.input_length for shape in shapes) + max(shape.output_length for shape in shapes)
    scale = min(1.0, (context - 2) / longest)
    return tuple(
        Arrival(0.0, max(1, int(shape.input_length * scale)), max(1, int(shape.output_length * scale)))
        for shape in shapes
    )
