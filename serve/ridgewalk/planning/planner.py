"""All placements of a model on given hardware, simulated and ranked."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

from ridgewalk.placement.hardware import HardwareSpec
from ridgewalk.placement.memory import MemoryPlanError
from ridgewalk.placement.mesh_fit import mesh_problem
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.planning.at_best import outcome_at_best
from ridgewalk.planning.shape import Placement, enumerate_placements
from ridgewalk.planning.simulator import Outcome, Scene, memory_of, shared, simulate
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo

Objective = Literal["throughput", "goodput"]

SMALL_LOAD = 200_000
"""Tokens to generate, below which all placements are simulated before another process would have started."""


@dataclass(frozen=True)
class Candidate:
    """A placement, and what it does with the load, or why it cannot."""

    placement: Placement
    outcome: Outcome | None
    problem: str = ""

    @property
    def simulated(self) -> bool:
        """False: `outcome` is one that it cannot exceed."""
        return self.outcome is None or self.outcome.at_best is None


def all_placements(hardware: HardwareSpec, num_devices: int, spec: ModelSpec) -> list[Placement]:
    """Placements that use so many of the devices.

    Of a machine whose cores a rank can share out as threads, fewer ranks use all of them too.
    """
    counts = sorted({num_devices, *(count for count in hardware.by_ranks if count <= num_devices)}, reverse=True)
    return [
        placement
        for count in counts
        for placement in enumerate_placements(count, hardware.devices_per_node, spec.moe is not None)
    ]


def dtype_problem(hardware: HardwareSpec, dtype: str) -> str:
    """Why a model of this dtype cannot be planned for, to go on from the hardware's name; empty when it can."""
    if dtype in hardware.flops:
        return ""
    return f"has no rate of products in {dtype}, the model's dtype; it has them in {', '.join(sorted(hardware.flops))}"


def evaluate(scene: Scene, placements: Sequence[Placement], needed: Collection[str] | None = None) -> list[Candidate]:
    """Simulate what can be loaded, on all cores of this machine; in the order given.

    Unless ``needed`` is None, pipelines that are not named in it are simulated only if, at best, they take less time
    than the best of the others: simulating one costs several times as much.
    """
    problems = [_problem(scene, placement) for placement in placements]
    feasible = [placement for placement, problem in zip(placements, problems, strict=True) if not problem]
    tokens = sum(arrival.output_length for arrival in scene.arrivals)
    workers = min(len(feasible), os.cpu_count() or 1)
    if workers < 2 or tokens < SMALL_LOAD:
        found = {placement: Candidate(placement, simulate(scene, placement)) for placement in feasible}
    else:
        # Nothing that a simulation makes is in a cycle, so it needs no collector.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=gc.disable) as pool:
            found = _simulate_in(pool, scene, feasible, needed)
    return [
        Candidate(placement, None, problem) if problem else found[placement]
        for placement, problem in zip(placements, problems, strict=True)
    ]


def _simulate_in(
    pool: Executor, scene: Scene, placements: Sequence[Placement], needed: Collection[str] | None
) -> dict[Placement, Candidate]:
    """The longest first: larger batches cost more to simulate, and so do more stages."""
    waiting = sorted(placements, key=lambda each: min((-shape.mesh.pp, shape.replicas) for shape in each.shapes))
    late = [] if needed is None else [each for each in waiting if _has_stages(each) and each.name not in needed]
    futures = {each: pool.submit(simulate, scene, each) for each in waiting if each not in late}
    bounds = {each: pool.submit(outcome_at_best, scene, each) for each in late}  # short: they fill what cores are idle
    found = {placement: Candidate(placement, future.result()) for placement, future in futures.items()}
    shortest = min((each.outcome.makespan_s for each in found.values() if each.outcome is not None), default=math.inf)
    at_best = {placement: future.result() for placement, future in bounds.items()}
    possible = [placement for placement, outcome in at_best.items() if outcome.makespan_s < shortest]
    futures = {each: pool.submit(simulate, scene, each) for each in possible}
    found.update((placement, Candidate(placement, outcome)) for placement, outcome in at_best.items())
    found.update((placement, Candidate(placement, future.result())) for placement, future in futures.items())
    return found


def _has_stages(placement: Placement) -> bool:
    return any(shape.mesh.pp > 1 for shape in placement.shapes)


def rank(candidates: Sequence[Candidate], objective: Objective, slo: LatencySlo = NO_SLO) -> list[Candidate]:
    """Best first; those that cannot be loaded last. Of equals, the one that was given first.

    ``slo``: what goodput counts by.
    """

    def score(candidate: Candidate) -> tuple[bool, float, float]:
        outcome = candidate.outcome
        if outcome is None:
            return (True, 0.0, 0.0)
        good = outcome.goodput_per_s(slo) if objective == "goodput" else 0.0
        return (False, -good, -outcome.throughput_tokens_per_s)

    return sorted(candidates, key=score)


def _problem(scene: Scene, placement: Placement) -> str:
    """Why it cannot be loaded, in a sentence; empty when it can."""
    if placement.num_devices > scene.hardware.num_devices:
        return f"it needs {placement.num_devices} devices, and there are {scene.hardware.num_devices}"
    problem = _node_problem(placement, scene.hardware)
    if problem:
        return problem
    for shape in placement.shapes:
        unfit = mesh_problem(scene.spec, shape.mesh)
        if unfit:
            return unfit
        try:
            memory_of(shared(scene, placement), shape)
        except MemoryPlanError as error:
            return str(error)
    return ""


def _node_problem(placement: Placement, hardware: HardwareSpec) -> str:
    """Tensor-parallel ranks share a node: the service never splits them; each layer would wait for the slower link.

    Groups are put into nodes largest first, each into the first that has room, which for powers of two is the best.
    """
    free = [hardware.devices_per_node] * hardware.num_nodes
    for shape in sorted(placement.shapes, key=lambda shape: -shape.mesh.tp):
        for _ in range(shape.num_devices // shape.mesh.tp):
            node = next((node for node, devices in enumerate(free) if devices >= shape.mesh.tp), None)
            if node is None:
                return (
                    f"its tensor-parallel groups of {shape.mesh.tp} do not all fit into {hardware.num_nodes} "
                    f"node{'s' * (hardware.num_nodes > 1)} of {hardware.devices_per_node}, and none is split"
                )
            free[node] -= shape.mesh.tp
    return ""
