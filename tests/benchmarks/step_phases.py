"""Where the time of measured steps goes: what ranks compute, what moving data costs, and what they wait for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from ridgewalk.engine.step import CollectiveTiming, RankTimings
from ridgewalk.placement.mesh import Mesh

Calls = dict[int, list[CollectiveTiming]]
"""The calls of each rank of one process group, by flat rank."""


def step_phases(steps: Sequence[Sequence[RankTimings]], mesh: Mesh) -> dict[str, float]:
    """Seconds a step by phase, the mean over ranks and steps; together they are the step.

    Time in a collective is its ``transfer``, the shortest time of its ranks, under the call's name; what a rank spent
    in it beyond that is ``wait``: it waited for the late ones. ``bubble`` is the wait for the stage before.
    """
    phases: defaultdict[str, float] = defaultdict(float)
    for ranks in steps:
        for timings in ranks:
            for phase, seconds in timings.phases.items():
                phases[phase] += seconds
        for calls in _process_groups(ranks, mesh):
            _split(calls, phases)
    phases.pop("collective", None)
    num_rank_steps = max(1, sum(len(ranks) for ranks in steps))
    return {phase: seconds / num_rank_steps for phase, seconds in phases.items()}


def print_phases(steps: Sequence[Sequence[RankTimings]], mesh: Mesh) -> None:
    """A Markdown table, the largest first."""
    phases = step_phases(steps, mesh)
    total = sum(phases.values())
    print(f"\nOf a step, mean over the ranks of {mesh.name}:\n\n| phase | ms | share |\n|---|---|---|")
    for phase, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        print(f"| {phase} | {seconds * 1e3:.2f} | {seconds / total:.1%} |")
    print(f"| step | {total * 1e3:.2f} | |")


def _process_groups(ranks: Sequence[RankTimings], mesh: Mesh) -> Iterator[Calls]:
    """Calls by process group; sends and receives between stages are each rank's own."""
    groups: defaultdict[tuple[object, ...], Calls] = defaultdict(dict)
    for timings in ranks:
        dp, pp, _ = mesh.coordinates(timings.rank)
        keys = {"tp": ("tp", dp, pp), "ep": ("ep", pp)}
        for call in timings.collectives:
            members = groups[keys.get(call.group, (call.group, timings.rank, call.op))]
            members.setdefault(timings.rank, []).append(call)
    yield from groups.values()


def _split(calls: Calls, phases: defaultdict[str, float]) -> None:
    for same in zip(*calls.values(), strict=True):
        shortest = min(call.seconds for call in same)
        phases[same[0].op] += shortest * len(same)
        phases["wait"] += sum(call.seconds - shortest for call in same)
