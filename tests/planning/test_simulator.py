"""The simulation, in loads small enough to work out, and against its own single steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from ridgewalk.placement.data_files import shipped_path
from ridgewalk.placement.hardware import find_hardware
from ridgewalk.placement.mesh import Mesh, placement_name
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.planning import planner
from ridgewalk.planning.at_best import outcome_at_best
from ridgewalk.planning.load import make_load
from ridgewalk.planning.planner import Candidate, evaluate, rank
from ridgewalk.planning.policy import POLICIES
from ridgewalk.planning.replica_simulation import ReplicaSimulation
from ridgewalk.planning.shape import ShapeError, enumerate_placements, parse_placement
from ridgewalk.planning.simulator import Arrival, Outcome, Scene, simulate
from ridgewalk.planning.verdict import reason
from ridgewalk.routing.latency_slo import LatencySlo


def scene(arrivals: list[Arrival], hardware: str = "8xh200", model: str = "qwen2.5-14b", **policy: object) -> Scene:
    path = shipped_path("models", model)
    assert path is not None
    spec = ModelSpec.from_config(json.loads(path.read_text()))
    return Scene(spec, find_hardware(hardware), replace(POLICIES["vllm"], **policy), tuple(arrivals))  # type: ignore[arg-type]


def batch(count: int = 24, longest: int = 400) -> list[Arrival]:
    return [Arrival(0.0, 40 + 7 * at % 90, 20 + (at * 97) % longest) for at in range(count)]


def singly(monkeypatch: pytest.MonkeyPatch, situation: Scene, placement: str) -> Outcome:
    with monkeypatch.context() as patched:
        patched.setattr(ReplicaSimulation, "_advance", lambda self, limit_s: False)
        return simulate(situation, parse_placement(placement))


@pytest.mark.parametrize("placement", ["TP8", "DP8", "DP4xTP2", "PP4xTP2", "DP2xPP2xTP2"])
@pytest.mark.parametrize("memory_share", [0.9, 0.25])
def test_many_steps_at_once_take_the_time_of_single_ones(
    monkeypatch: pytest.MonkeyPatch, placement: str, memory_share: float
) -> None:
    situation = scene(batch(), memory_share=memory_share, max_num_batched_tokens=256)
    bulk, single = simulate(situation, parse_placement(placement)), singly(monkeypatch, situation, placement)
    close = 0.02 if "PP" in placement else 1e-6  # micro-batches of unequal size go round as if they were equal
    assert bulk.makespan_s == pytest.approx(single.makespan_s, rel=close)
    assert bulk.ttft_p50_s == pytest.approx(single.ttft_p50_s, rel=close)
    assert bulk.tpot_p50_s == pytest.approx(single.tpot_p50_s, rel=close)
    assert (bulk.preemptions, bulk.recomputed_tokens) == (single.preemptions, single.recomputed_tokens)


def test_arrivals_are_seen_at_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = [replace(arrival, time_s=0.21 * at) for at, arrival in enumerate(batch(12))]
    situation = scene(arrivals)
    bulk, single = simulate(situation, parse_placement("DP2xTP4")), singly(monkeypatch, situation, "DP2xTP4")
    assert bulk.makespan_s == pytest.approx(single.makespan_s, rel=1e-6)
    assert bulk.ttft_p50_s == pytest.approx(single.ttft_p50_s, rel=1e-6)
    assert all(log.first_token_s > log.arrival_s for log in bulk.logs)


def test_every_request_gets_all_its_tokens_whatever_the_placement() -> None:
    arrivals = batch(12, 60)
    for name in ("TP8", "PP8", "DP4+TP4", "DP2xEP2", "DP2xPP2xTP2xEP4"):
        outcome = simulate(scene(arrivals, model="mixtral-8x7b"), parse_placement(name))
        assert outcome.output_tokens == sum(arrival.output_length for arrival in arrivals), name
        assert len(outcome.logs) == 12
        assert all(log.arrival_s < log.first_token_s <= log.end_s < math.inf for log in outcome.logs), name
        assert sum(outcome.spent_s.values()) <= outcome.makespan_s * 1.001, name


def test_too_little_kv_means_preemptions_and_a_longer_time() -> None:
    arrivals = [Arrival(0.0, 100, 1500) for _ in range(40)]
    ample = simulate(scene(arrivals, "h200"), parse_placement("TP1"))
    scarce = simulate(scene(arrivals, "h200", memory_share=0.236), parse_placement("TP1"))
    assert ample.preemptions == ample.recomputed_tokens == 0
    assert scarce.kv_capacity_tokens < 40 * 1600 < ample.kv_capacity_tokens
    assert scarce.preemptions > 0
    assert scarce.recomputed_tokens > 0
    assert scarce.makespan_s > 1.3 * ample.makespan_s


@pytest.mark.parametrize("placement", ["TP8", "PP8", "DP2xPP2xTP2", "DP4+TP4", "DP2xPP2xTP2xEP4"])
@pytest.mark.parametrize("policy", ["vllm", "ridgewalk"])
def test_no_simulation_exceeds_the_outcome_at_best(placement: str, policy: str) -> None:
    limits = replace(POLICIES[policy], max_num_seqs=2)  # seats bind in some, the longest request in others
    situation = replace(scene(batch(18, 300), model="mixtral-8x7b"), policy=limits)
    best, found = (each(situation, parse_placement(placement)) for each in (outcome_at_best, simulate))
    assert best.makespan_s < found.makespan_s
    assert best.kv_capacity_tokens == found.kv_capacity_tokens
    assert best.output_tokens == found.output_tokens


@pytest.mark.parametrize("policy", ["vllm", "ridgewalk"])
def test_kv_bounds_what_is_possible_at_best(policy: str) -> None:
    scarce = replace(POLICIES[policy], memory_share=0.06)
    situation = replace(scene([Arrival(0.0, 500, 1500) for _ in range(300)]), policy=scarce)
    for name in ("TP8", "PP2xTP4"):
        best, found = (each(situation, parse_placement(name)) for each in (outcome_at_best, simulate))
        assert best.at_best == "kv"
        one_s = best.logs[0].end_s
        held = 300 * (500 + 1499 / 2) / best.kv_capacity_tokens  # KV caches full, of requests each of which is alone
        assert one_s < held * one_s < best.makespan_s < found.makespan_s


@pytest.mark.parametrize("placement", ["PP2xTP4", "DP2xPP2xTP2", "DP2xPP2xTP2xEP4", "2xPP2xTP2xEP2"])
@pytest.mark.parametrize("limits", [{"memory_share": 0.2}, {"max_num_seqs": 6}])
def test_steps_bound_what_is_possible_at_best(placement: str, limits: dict[str, float]) -> None:
    arrivals = [Arrival(0.0, 20 + 11 * at % 400, 30 + (at * 97) % 700) for at in range(120)]
    situation = scene(arrivals, model="mixtral-8x7b", **limits)
    best, found = (each(situation, parse_placement(placement)) for each in (outcome_at_best, simulate))
    assert found.makespan_s / 4 < best.makespan_s < found.makespan_s


@pytest.mark.parametrize(
    ("model", "placement", "long", "short", "count"),
    [
        ("qwen2.5-14b", "PP4", (100_000, 3000), (10, 3000), 7),
        ("qwen2.5-14b", "PP8", (100_000, 3000), (10, 3000), 7),
        ("mixtral-8x7b", "DP2xPP2xTP2xEP4", (30_000, 2000), (10, 2000), 1),
    ],
)
def test_a_long_request_beside_short_ones_is_within_the_bound(
    model: str, placement: str, long: tuple[int, int], short: tuple[int, int], count: int
) -> None:
    """The micro-batches of a pipeline are simulated as equal, so that the short ones carry a part of its context."""
    situation = scene([Arrival(0.0, *long), *[Arrival(0.0, *short)] * count], model=model, max_num_seqs=64)
    best, found = (each(situation, parse_placement(placement)) for each in (outcome_at_best, simulate))
    assert best.makespan_s < found.makespan_s


def test_the_verdict_on_a_bound_names_what_it_is_made_of() -> None:
    group, pipeline = (parse_placement(name) for name in ("TP8", "PP2xTP4"))
    scarce = replace(POLICIES["vllm"], memory_share=0.06)
    situation = replace(scene([Arrival(0.0, 500, 1500) for _ in range(300)]), policy=scarce)
    best = Candidate(group, simulate(situation, group))
    for limits, words in (
        ({}, "capacity cliff, room for "),
        ({"memory_share": 0.9}, "synchronization cliff, a token takes "),
        ({"memory_share": 0.9, "max_num_seqs": 2}, "too few seats"),
    ):
        bounded = replace(situation, policy=replace(scarce, **limits))
        bound = Candidate(pipeline, outcome_at_best(bounded, pipeline))
        assert not bound.simulated
        assert words in reason(bound, best)


def test_a_request_alone_takes_what_it_takes_at_best() -> None:
    alone = scene([Arrival(0.0, 1, 200)])
    for name in ("TP8", "PP4xTP2"):
        best, found = (each(alone, parse_placement(name)) for each in (outcome_at_best, simulate))
        assert best.makespan_s == pytest.approx(found.makespan_s, rel=1e-6)


def test_pipelines_that_cannot_win_are_bounded_unless_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "SMALL_LOAD", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    situation = scene(batch(8, 120))
    placements = [parse_placement(name) for name in ("DP8", "PP8", "PP4xTP2", "TP16")]
    candidates = evaluate(situation, placements, {"PP8"})
    assert [each.placement for each in candidates] == placements
    assert [each.simulated for each in candidates] == [True, True, False, True]
    best, pruned = rank(candidates, "throughput")[:2]
    assert best.placement.name == "DP8"
    assert pruned.outcome is not None
    assert reason(candidates[2], best).startswith("at most ")


def test_ranking_is_by_throughput_or_by_requests_within_the_limits() -> None:
    situation = scene(list(make_load("chat", 16, None, 0)))
    candidates = evaluate(situation, [parse_placement(name) for name in ("DP8", "TP8", "TP16")])
    by_throughput = rank(candidates, "throughput")
    assert by_throughput[-1].placement.name == "TP16"
    fastest = min(candidates[:2], key=lambda each: each.outcome.tpot_p50_s if each.outcome else math.inf)
    assert fastest.outcome is not None
    limits = LatencySlo(tpot_s=fastest.outcome.tpot_p50_s * 1.01)
    assert rank(candidates, "goodput", limits)[0] is fastest


def test_placements_of_a_dense_model_use_every_device_once() -> None:
    placements = enumerate_placements(8, 8, sparse=False)
    names = [placement.name for placement in placements]
    assert len(set(names)) == len(names)
    assert set(names) == {
        "TP8", "PP2xTP4", "PP4xTP2", "PP8", "DP2xTP4", "DP2xPP2xTP2", "DP2xPP4", "DP4xTP2", "DP4xPP2", "DP8",
        "DP4+DP2xTP2", "DP4+TP4", "DP2xTP2+TP4",
    }  # fmt: skip
    assert all(placement.num_devices == 8 for placement in placements)


def test_sparse_models_have_expert_parallel_ones_too_and_tensor_parallelism_stays_in_a_node() -> None:
    names = {placement.name for placement in enumerate_placements(16, 8, sparse=True)}
    assert {"DP16xEP16", "DP2xTP8xEP16", "DP2xPP2xTP4xEP8", "2xDP8xEP8", "PP2xTP8"} <= names
    assert not any("TP16" in name for name in names)


@pytest.mark.parametrize("name", ["TP8", "DP4xTP2", "PP2xTP4", "DP8xEP8", "2xDP2xEP2", "DP2+TP2", "DP2xPP2xTP2xEP4"])
def test_a_name_is_read_as_it_is_written(name: str) -> None:
    assert parse_placement(name).name == name
    assert parse_placement(name.lower()).name == name


def test_names_and_meshes_agree() -> None:
    (shape,) = parse_placement("2xDP2xPP2xTP2xEP4").shapes
    assert (shape.replicas, shape.mesh) == (2, Mesh(2, 2, 2, expert_parallel=True))
    assert placement_name(shape.replicas, shape.mesh) == "2xDP2xPP2xTP2xEP4"


@pytest.mark.parametrize("name", ["", "TP", "TP0", "8", "TP2xPP2", "DP2xTP2x", "TP2+", "EP3xTP2"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ShapeError):
        parse_placement(name)
