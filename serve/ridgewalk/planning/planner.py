"""All placements of a model on given hardware, simulated and ranked."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

from ridgewalk.placement.memory import MemoryPlanError
from ridgewalk.placement.mesh_fit import mesh_problem
from ridgewalk.planning.shape import Placement
from ridgewalk.planning.simulator import Outcome, Scene, memory_of, shared, simulate

Objective = Literal["throughput", "goodput"]

SMALL_LOAD = 200_000
"""Tokens to generate, below which all placements are simulated before another process would have started."""


@dataclass(frozen=True)
class Limits:
    """Of a good request, in seconds."""

    ttft_s: float = float("inf")
    tpot_s: float = float("inf")


@dataclass(frozen=True)
class Candidate:
    """A placement, and what it does with the load, or why it cannot."""

    placement: Placement
    outcome: Outcome | None
    problem: str = ""


def evaluate(scene: Scene, placements: Sequence[Placement]) -> list[Candidate]:
    """Simulate what can be loaded, on all cores of this machine; in the order given."""
    problems = [_problem(scene, placement) for placement in placements]
    feasible = [placement for placement, problem in zip(placements, problems, strict=True) if not problem]
    tokens = sum(arrival.output_length for arrival in scene.arrivals)
    workers = min(len(feasible), os.cpu_count() or 1)
    if workers < 2 or tokens < SMALL_LOAD:
        outcomes = [simulate(scene, placement) for placement in feasible]
    else:
        # Nothing that a simulation makes is in a cycle, so it needs no collector. Long pipelines take longest: first.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=gc.disable) as pool:
            futures = {
                placement: pool.submit(simulate, scene, placement)
                for placement in sorted(feasible, key=lambda each: -max(shape.mesh.pp for shape in each.shapes))
            }
            outcomes = [futures[placement].result() for placement in feasible]
    found = iter(outcomes)
    return [
        Candidate(placement, None if problem else next(found), problem)
        for placement, problem in zip(placements, problems, strict=True)
    ]


def rank(candidates: Sequence[Candidate], objective: Objective, limits: Limits) -> list[Candidate]:
    """Best first; those that cannot be loaded last. Of equals, the one that was given first."""

    def score(candidate: Candidate) -> tuple[bool, float, float]:
        outcome = candidate.outcome
        if outcome is None:
            return (True, 0.0, 0.0)
        good = outcome.goodput_per_s(limits.ttft_s, limits.tpot_s) if objective == "goodput" else 0.0
        return (False, -good, -outcome.throughput_tokens_per_s)

    return sorted(candidates, key=score)


def _problem(scene: Scene, placement: Placement) -> str:
    """Why it cannot be loaded, in a sentence; empty when it can."""
    if placement.num_devices > scene.hardware.num_devices:
        return f"it needs {placement.num_devices} devices, and there are {scene.hardware.num_devices}"
    for shape in placement.shapes:
        problem = mesh_problem(scene.spec, shape.mesh)
        if problem:
            return problem
        try:
            memory_of(shared(scene, placement), shape)
        except MemoryPlanError as error:
            return str(error)
    return ""
