"""What no simulation of a placement can exceed, worked out without one."""

from __future__ import annotations

import math
from typing import NamedTuple

from ridgewalk.placement.cost_model import CostModel, GroupLoad, StepTime
from ridgewalk.planning.replica_simulation import RequestLog
from ridgewalk.planning.shape import Placement, Shape
from ridgewalk.planning.simulator import Arrival, AtBest, Outcome, Scene, memory_of, shared


def outcome_at_best(scene: Scene, placement: Placement) -> Outcome:
    """What no simulation of the placement can exceed.

    A request gets its next token when the step of the last has crossed host and stages, and no such step is shorter
    than that of the request alone: no term of a step's time falls when its load grows. So each takes at least as long
    as this, and the makespan is at least the time of the longest, that of all of them over the seats (``max_num_seqs``
    of each attention group), and the KV that they hold times the time for which they do over the capacity for it.
    What a request holds and how long a step of it takes grow together, so the product of their means, the prompt with
    half of the output and the mean step, is no more than what it takes. Seats and KV bound it twice: see
    `_time_of_steps`.

    Raises:
        MemoryPlanError: a shape does not fit.
    """
    scene = shared(scene, placement)
    groups = [(shape.replicas * shape.mesh.dp, memory_of(scene, shape).kv_tokens) for shape in placement.shapes]
    seats = sum(count for count, _ in groups) * scene.policy.max_num_seqs
    capacity = sum(count * kv_tokens for count, kv_tokens in groups)
    logs = [RequestLog(arrival.time_s, arrival.output_length) for arrival in scene.arrivals]
    for log, token_s in zip(logs, _fastest_tokens(scene, placement), strict=True):
        log.first_token_s = log.arrival_s + token_s
        log.end_s = log.arrival_s + log.output_length * token_s
    times_s = [log.end_s - log.arrival_s for log in logs]
    kv_time = sum(_mean_context(each) * time_s for each, time_s in zip(scene.arrivals, times_s, strict=True))
    bounds: dict[AtBest, float] = {
        "stages": max(log.end_s for log in logs) - scene.arrivals[0].time_s,
        "seats": sum(times_s) / seats,
        "kv": kv_time / capacity,
    }
    if len(placement.shapes) == 1:  # of several nobody knows which takes how much of the load
        by_seats, by_kv = _time_of_steps(scene, placement.shapes[0], seats, capacity)
        bounds["seats"], bounds["kv"] = max(bounds["seats"], by_seats), max(bounds["kv"], by_kv)
    decisive = max(bounds, key=lambda name: bounds[name])
    return Outcome(
        makespan_s=bounds[decisive],
        output_tokens=sum(log.output_length for log in logs),
        logs=tuple(logs),
        kv_capacity_tokens=capacity,
        preemptions=0,
        recomputed_tokens=0,
        spent_s={},
        at_best=decisive,
    )


def _fastest_tokens(scene: Scene, placement: Placement) -> list[float]:
    """By arrival: the mean seconds of one token when nothing else runs, on the fastest of the shapes.

    A simulation takes the micro-batches of a pipeline, and a group's part of them, for equal: a request that is beside
    others in others' micro-batches weighs on the steps with its share alone.
    """
    fastest = [math.inf] * len(scene.arrivals)
    for shape in placement.shapes:
        cost = CostModel(scene.spec, shape.mesh, scene.hardware)
        micro_batches = min(shape.mesh.pp, len(scene.arrivals))
        for index, arrival in enumerate(scene.arrivals):
            # Attention takes time in proportion to the context, so that its mean decides.
            context = _mean_context(arrival)
            tokens, read = 1 if shape.mesh.dp == 1 else 1 / micro_batches, context / micro_batches
            alone = GroupLoad(tokens, tokens, read, read)
            stages = cost.stage_times([alone, *[GroupLoad()] * (shape.mesh.dp - 1)])
            host_s, ranks_s = cost.host_s(1), sum(stage.total for stage in stages)
            token_s = max(host_s, ranks_s) if scene.host_overlaps else host_s + ranks_s
            fastest[index] = min(fastest[index], token_s)
    return fastest


def _mean_context(arrival: Arrival) -> float:
    """Tokens that a request holds in KV, and reads in a step: mean over its output."""
    return arrival.prompt_length + (arrival.output_length - 1) / 2


class _LeastTime(NamedTuple):
    """No step takes less than ``per_step + per_token * tokens + per_context * cached tokens read``. Seconds.

    As long as the terms that count by token are affine, or convex, in tokens, as `collective_cost` has them.
    """

    per_step: float
    per_token: float
    per_context: float


def _time_of_steps(scene: Scene, shape: Shape, seats: int, capacity: int) -> tuple[float, float]:
    """Seconds for all steps of the load, given the seats and the KV capacity of all replicas.

    Few large steps spend least on the busiest stage; many small ones hold seats and KV for the shortest time. Let M be
    the number of a replica's steps, x_i the tokens that step i samples and k_i the cached tokens that it reads, in all
    its attention groups. Over the steps x_i adds up to T, the tokens of the outputs, and k_i to K, each output token
    being sampled once, whatever is preempted. With the `_LeastTime` (a, b, c) of a stage and (A, B, D) of the
    whole way of a step:

    - A stage serves one step at a time, and computes each token but the last of each request at least once, N in all:
      ``time >= a M + b N + c K``.
    - A sequence has a seat and the KV of what a step reads for as long as the step takes, and is in one at a time:
      ``seats * time >= sum (A + B x_i) x_i >= A T + B T^2 / M`` and
      ``capacity * time >= sum (A + D k_i) k_i >= A K + D K^2 / M``, by Cauchy and Schwarz.

    The first rises with M and the others fall, so where they meet is the least that the larger can be. That is convex
    in (T, N, K), which add up to the load over replicas alike: one of them takes as long as with an even share.
    """
    cost, replicas = CostModel(scene.spec, shape.mesh, scene.hardware), shape.replicas
    sampled = sum(each.output_length for each in scene.arrivals) / replicas
    computed = sum(each.prompt_length + each.output_length - 1 for each in scene.arrivals) / replicas
    contexts = sum(each.output_length * _mean_context(each) for each in scene.arrivals) / replicas
    stages = _least_times(cost)
    way = _LeastTime(*map(sum, zip(*stages, strict=True)))
    if shape.mesh.pp > 1 or not scene.host_overlaps:
        host_s = cost.host_s(0)
        way = _LeastTime(way.per_step + host_s, way.per_token + cost.host_s(1) - host_s, way.per_context)
    seat_s, kv_s = sampled * replicas / seats, contexts * replicas / capacity
    lines = [(each.per_step, each.per_token * computed + each.per_context * contexts) for each in stages]
    return (
        max(_meeting(*line, way.per_step * seat_s, way.per_token * seat_s * sampled) for line in lines),
        max(_meeting(*line, way.per_step * kv_s, way.per_context * kv_s * contexts) for line in lines),
    )


def _least_times(cost: CostModel) -> list[_LeastTime]:
    """Of each stage. Tokens are spread evenly over attention groups, of which the slowest counts."""
    groups, many = cost.mesh.dp, 2.0**20

    def stage_times(tokens: float, contexts: float) -> list[StepTime]:
        share = GroupLoad(tokens / groups, tokens / groups, contexts / groups, contexts / groups)
        return cost.stage_times([share] * groups)

    least = []
    for one, two, reading in zip(stage_times(1, 0), stage_times(2, 0), stage_times(1, many), strict=True):
        # These are constants and what is proportional to tokens. Weights and products are not: they count as of one.
        per_token = sum(
            getattr(two, term) - getattr(one, term) for term in ("all_reduce", "dispatch_combine", "launch", "send")
        )
        least.append(_LeastTime(one.total - per_token, per_token, (reading.total - one.total) / many))
    return least


def _meeting(slope: float, start: float, end: float, bend: float) -> float:
    """Where ``start + slope * m`` and ``end + bend / m`` meet, for an m over 0. None of the numbers is negative."""
    return (start + end + math.hypot(end - start, 2 * math.sqrt(slope * bend))) / 2
