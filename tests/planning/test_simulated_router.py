"""The service's own routing policies, driven by the simulation."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from ridgewalk.placement.data_files import shipped_path
from ridgewalk.placement.hardware import find_hardware
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.planning.policy import POLICIES
from ridgewalk.planning.replica_simulation import ReplicaSimulation
from ridgewalk.planning.shape import parse_placement
from ridgewalk.planning.simulator import Arrival, Outcome, Scene, simulate
from ridgewalk.routing.decision import RoutingName

ROUTINGS: tuple[RoutingName, ...] = ("round_robin", "least_loaded", "kv_growth")


def skewed(count: int = 240, rate: float = 20.0, short: int = 40) -> tuple[Arrival, ...]:
    """A tenth write twenty times more."""
    rng, now, arrivals = random.Random(0), 0.0, []
    for number in range(count):
        now += rng.expovariate(rate)
        is_long = number % 10 == 3
        arrivals.append(Arrival(now, 100, short * (20 if is_long else 1), "high" if is_long else "low"))
    return tuple(arrivals)


def serve(routing: RoutingName | None, placement: str, arrivals: tuple[Arrival, ...]) -> Outcome:
    path = shipped_path("models", "r1-distill-qwen-32b")
    assert path is not None
    spec = ModelSpec.from_config(json.loads(path.read_text()))
    policy = replace(POLICIES["ridgewalk"], routing=routing)
    return simulate(Scene(spec, find_hardware("8xh200"), policy, arrivals), parse_placement(placement))


def worst(outcome: Outcome, count: int) -> float:
    """Seconds that all but so many requests took at most."""
    return sorted(log.end_s - log.arrival_s for log in outcome.logs)[-count - 1]


@pytest.mark.parametrize("routing", [*ROUTINGS, None])
def test_whoever_routes_every_request_is_served(routing: RoutingName | None) -> None:
    arrivals = skewed(60)
    outcome = serve(routing, "DP2+TP2", arrivals)
    assert sorted(log.output_length for log in outcome.logs) == sorted(each.output_length for each in arrivals)


def test_on_mixed_placements_the_longest_waits_are_shorter_than_of_those_that_count_requests() -> None:
    arrivals = skewed()
    latencies = {routing: worst(serve(routing, "DP4+TP4", arrivals), 3) for routing in ROUTINGS}
    assert latencies["kv_growth"] < 0.8 * latencies["least_loaded"]
    assert latencies["kv_growth"] < 0.8 * latencies["round_robin"]


def test_equal_requests_fill_equal_replicas_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Counter[int] = Counter()
    arrive = ReplicaSimulation.arrive

    def count(self: ReplicaSimulation, *arguments: object) -> None:
        taken[id(self)] += 1
        arrive(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ReplicaSimulation, "arrive", count)
    serve("kv_growth", "DP4xTP2", tuple(Arrival(at / 20, 100, 100) for at in range(120)))
    assert min(taken.values()) >= 20
