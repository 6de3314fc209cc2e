"""What `ridgewalk plan` does, from its flags to its output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer
from rich.console import Console

from ridgewalk.bench.options import parse_duration_ms
from ridgewalk.config import ConfigError
from ridgewalk.model_source import find_model
from ridgewalk.placement.data_files import shipped_names, shipped_path
from ridgewalk.placement.hardware import HardwareError, HardwareSpec, find_hardware
from ridgewalk.placement.model_spec import ModelSpec, UnsupportedModelError
from ridgewalk.planning.load import make_load
from ridgewalk.planning.planner import Candidate, Objective, all_placements, dtype_problem, evaluate, rank
from ridgewalk.planning.policy import POLICIES
from ridgewalk.planning.report import as_account, as_configuration, as_data, as_table
from ridgewalk.planning.shape import Placement, ShapeError, parse_placement
from ridgewalk.planning.simulator import Scene
from ridgewalk.planning.verdict import reason
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo
from ridgewalk.zoo import list_zoo


def run_plan(
    model: str,
    hardware: str,
    workload: str,
    requests: int | None,
    rate: float | None,
    seed: int,
    policy: str,
    objective: str,
    ttft: str | None,
    tpot: str | None,
    only: str | None,
    as_json: bool,
    explain: str | None,
    emit: Path | None,
    plot: Path | None,
) -> None:
    """See `ridgewalk.planning.command.plan`. Raises ConfigError."""
    if policy not in POLICIES:
        raise ConfigError(f"--policy: there is no policy {policy!r}; there are {', '.join(POLICIES)}")
    goal, slo = _objective(objective, ttft, tpot)
    spec, served_name = _model(model)
    devices = _hardware(hardware, spec)
    arrivals = make_load(workload, requests, rate, seed, served_name)
    scene = Scene(spec, devices, POLICIES[policy].on(devices.device), arrivals, slo)
    if scene.max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"--workload: {workload} has requests of up to {scene.max_model_len:,} tokens, and the context of {model} "
            f"holds {spec.max_position_embeddings:,}; choose another workload"
        )
    placements = _placements(only, devices, spec)
    if explain is not None:
        explain = _parse("--explain", explain).name
        if explain not in [placement.name for placement in placements]:
            placements.append(_parse("--explain", explain))
    if plot is not None:
        from ridgewalk.planning.plot import check_plot

        check_plot(plot)
    asked_about = None if only is not None or goal != "throughput" else {explain or ""}
    ranked = rank(evaluate(scene, placements, asked_about), goal, slo)
    if as_json:
        typer.echo(json.dumps(as_data(ranked, slo), indent=1))
    else:
        last_s = scene.arrivals[-1].time_s
        when = f"at {rate or len(scene.arrivals) / last_s:.3g} a second" if last_s else "at once"
        title = f"{model} on {hardware}: {len(scene.arrivals)} requests of {workload} {when}, policy {policy}"
        console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
        console.print(as_table(ranked, title))
        for candidate in ranked:
            name = candidate.placement.name
            console.print(f"{name}: {reason(candidate, ranked[0], slo)}", markup=False, highlight=False)
    if explain is not None:
        _explain(ranked, explain, Console(stderr=as_json))
    if plot is not None:
        from ridgewalk.planning.plot import draw

        draw(ranked, f"{model} on {hardware}, {workload}", plot)
    if emit is not None:
        _emit(ranked[0], served_name, scene, emit)
    if ranked[0].outcome is None:
        raise ConfigError(
            f"--hardware: no placement of {model} fits on {hardware}; {ranked[0].placement.name}: {ranked[0].problem}"
        )


def _objective(objective: str, ttft: str | None, tpot: str | None) -> tuple[Objective, LatencySlo]:
    first, further = parse_duration_ms("--ttft", ttft), parse_duration_ms("--tpot", tpot)
    stated = [flag for flag, value in (("--ttft", first), ("--tpot", further)) if value is not None]
    if objective == "goodput":
        if not stated:
            raise ConfigError("--objective: goodput needs a limit; add --ttft 2s, --tpot 50ms or both")
        return "goodput", LatencySlo.of_ms(first, further)
    if objective != "throughput":
        raise ConfigError(f"--objective: there is no objective {objective!r}; there are throughput and goodput")
    if stated:
        raise ConfigError(f"{stated[0]}: a limit counts with --objective goodput only")
    return "throughput", NO_SLO


def _model(model: str) -> tuple[ModelSpec, str]:
    """Its shape, and what `ridgewalk serve` calls it."""
    path = shipped_path("models", model)
    try:
        if path is not None:
            config = json.loads(path.read_text())
            return ModelSpec.from_config(config), config["_name_or_path"]
        if model not in list_zoo() and "/" not in model and not Path(model).expanduser().is_dir():
            names = ", ".join((*shipped_names("models"), *list_zoo()))
            raise ConfigError(
                f"--model: there is no model {model!r}; there are {names}, local folders and hub ids (owner/name)"
            )
        return ModelSpec.from_folder(find_model(model)), model
    except UnsupportedModelError as error:
        raise ConfigError(f"--model: {error}") from None


def _hardware(text: str, spec: ModelSpec) -> HardwareSpec:
    try:
        hardware = find_hardware(text)
    except HardwareError as error:
        raise ConfigError(f"--hardware: {error}") from None
    problem = dtype_problem(hardware, spec.dtype)
    if problem:
        raise ConfigError(f"--hardware: {text} {problem}")
    return hardware


def _placements(only: str | None, hardware: HardwareSpec, spec: ModelSpec) -> list[Placement]:
    if only is None:
        return all_placements(hardware, hardware.num_devices, spec)
    named = {placement.name: placement for placement in (_parse("--only", name) for name in only.split(","))}
    return list(named.values())


def _parse(flag: str, name: str) -> Placement:
    try:
        return parse_placement(name)
    except ShapeError as error:
        raise ConfigError(f"{flag}: {error}") from None


def _explain(ranked: list[Candidate], name: str, console: Console) -> None:
    candidate = next(each for each in ranked if each.placement.name == name)
    if candidate.outcome is None:
        console.print(f"{name} cannot be loaded: {candidate.problem}", markup=False, highlight=False)
    else:
        console.print(as_account(candidate, candidate.outcome))


def _emit(best: Candidate, model: str, scene: Scene, path: Path) -> None:
    if best.outcome is None:
        return
    if Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().absolute())
    try:
        path.write_text(as_configuration(best.placement, model, scene))
    except OSError as error:
        raise ConfigError(f"--emit: {path} cannot be written: {error.strerror}") from None
