"""One placement under one load, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.placement.cost_model import CostModel
from ridgewalk.placement.hardware import HardwareSpec
from ridgewalk.placement.memory import BudgetSource, MemoryPlan, plan_memory
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.planning.policy import Policy
from ridgewalk.planning.replica_simulation import ReplicaSimulation, RequestLog
from ridgewalk.planning.shape import Placement, Shape
from ridgewalk.planning.simulated_router import SimulatedRouter, VllmBalancer
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo
from ridgewalk.routing.policy import make_policy

BLOCK_SIZE = 16

AtBest = Literal["stages", "seats", "kv"]
"""What an outcome at best is made of: the longest request's way through the stages, or what all of them need."""


@dataclass(frozen=True)
class Arrival:
    """One request of a load."""

    time_s: float
    prompt_length: int
    output_length: int
    effort: str = ""  # `reasoning_effort`, where the client shows it


@dataclass(frozen=True)
class Outcome:
    """What a placement did with a load. Tokens and seconds of virtual time."""

    makespan_s: float
    output_tokens: int
    logs: tuple[RequestLog, ...]
    kv_capacity_tokens: int
    preemptions: int
    recomputed_tokens: int
    spent_s: dict[str, float]  # by term, mean of the replicas
    at_best: AtBest | None = None  # None: simulated

    @property
    def throughput_tokens_per_s(self) -> float:
        """Generated tokens over the makespan."""
        return self.output_tokens / self.makespan_s

    @property
    def ttft_p50_s(self) -> float:
        """Median time to the first token."""
        return median(log.ttft_s for log in self.logs)

    @property
    def tpot_p50_s(self) -> float:
        """Median over requests of their mean time per further token; 0 when none has one."""
        times = [log.tpot_s for log in self.logs if log.tpot_s is not None]
        return median(times) if times else 0.0

    def goodput_per_s(self, slo: LatencySlo) -> float:
        """Requests a second that kept both limits."""
        good = sum(log.ttft_s <= slo.ttft_s and (log.tpot_s or 0.0) <= slo.tpot_s for log in self.logs)
        return good / self.makespan_s


@dataclass(frozen=True)
class Scene:
    """What all placements of a plan have in common."""

    spec: ModelSpec
    hardware: HardwareSpec
    policy: Policy
    arrivals: tuple[Arrival, ...]  # by time
    slo: LatencySlo = NO_SLO  # what every request asks for
    other_ranks: int = 0  # of other models, that share a machine's cores and memory

    @property
    def max_model_len(self) -> int:
        """Tokens that a request may have: its scheduler knows the longest prompt and the longest output."""
        return max(arrival.prompt_length for arrival in self.arrivals) + self.max_output_length

    @property
    def host_overlaps(self) -> bool:
        """Host and ranks work at the same time."""
        return self.policy.host_overlaps and not self.hardware.host_shares_cores

    @property
    def max_output_length(self) -> int:
        """Tokens of the longest output: every request's ``max_tokens``."""
        return max(arrival.output_length for arrival in self.arrivals)


def shared(scene: Scene, placement: Placement) -> Scene:
    """With the hardware as each rank of the placement has it."""
    replicas = sum(shape.replicas for shape in placement.shapes)
    ranks = placement.num_devices + scene.other_ranks
    return replace(scene, hardware=scene.hardware.shared_by(ranks, replicas + scene.other_ranks))


def memory_of(scene: Scene, shape: Shape) -> MemoryPlan:
    """Memory of a rank of a shape, on hardware that is `shared` already.

    Raises:
        MemoryPlanError: it does not fit.
    """
    budget = scene.hardware.rank_budget(scene.policy.memory_share)
    source = BudgetSource(
        f"{budget / scene.hardware.memory_bytes:.2g} of a rank's {scene.hardware.memory_bytes / 2**30:.1f} GiB gives",
        "more devices or fewer replicas are needed",
    )
    return plan_memory(
        scene.spec,
        shape.mesh,
        scene.spec.dtype,
        budget,
        BLOCK_SIZE,
        scene.policy.max_num_batched_tokens,
        scene.policy.max_num_seqs,
        scene.max_model_len,
        source=source,
        keeps_fp8=scene.hardware.keeps_fp8,
    )


def simulate(scene: Scene, placement: Placement) -> Outcome:
    """Serve the whole load.

    Raises:
        MemoryPlanError: a shape does not fit.
    """
    scene = shared(scene, placement)
    replicas: list[ReplicaSimulation] = []
    capacity = 0
    for shape in placement.shapes:
        memory = memory_of(scene, shape)
        cost = CostModel(scene.spec, shape.mesh, scene.hardware)
        config = _scheduler_config(scene, shape, memory)
        for _ in range(shape.replicas):
            replicas.append(ReplicaSimulation(config, cost, scene.max_output_length, scene.host_overlaps))
            capacity += memory.kv_tokens * shape.mesh.dp
    router = _router(scene, replicas)
    for seq_id, arrival in enumerate(scene.arrivals):
        for replica in replicas:
            replica.run_until(arrival.time_s)
        chosen = router.choose(arrival.time_s, seq_id, arrival.prompt_length, arrival.effort)
        chosen.arrive(arrival.time_s, seq_id, arrival.prompt_length, arrival.output_length, arrival.effort)
    for replica in replicas:
        replica.run_until(math.inf)
    return _outcome(scene, replicas, capacity)


def _router(scene: Scene, replicas: Sequence[ReplicaSimulation]) -> SimulatedRouter | VllmBalancer:
    if scene.policy.routing is None:
        return VllmBalancer(replicas)
    return SimulatedRouter(make_policy(scene.policy.routing, scene.max_model_len), replicas, scene.slo)


def _scheduler_config(scene: Scene, shape: Shape, memory: MemoryPlan) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=memory.num_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=scene.max_model_len,
        max_num_seqs=scene.policy.max_num_seqs,
        max_num_batched_tokens=scene.policy.max_num_batched_tokens,
        max_steps_in_flight=shape.mesh.pp,
        num_groups=shape.mesh.dp,
        enable_prefix_caching=True,  # what a preempted request had may be there still
        counts_only=True,
        admission=scene.policy.admission,
    )


def _outcome(scene: Scene, replicas: Sequence[ReplicaSimulation], capacity: int) -> Outcome:
    logs = [log for replica in replicas for log in replica.logs.values()]
    counters = [replica.scheduler.counters for replica in replicas]
    begin, end = scene.arrivals[0].time_s, max(log.end_s for log in logs)
    terms = {term for replica in replicas for term in replica.spent_s}
    spent = {term: sum(replica.spent_s.get(term, 0.0) for replica in replicas) / len(replicas) for term in terms}
    return Outcome(
        makespan_s=end - begin,
        output_tokens=sum(log.output_length for log in logs),
        logs=tuple(logs),
        kv_capacity_tokens=capacity,
        preemptions=sum(count.num_preemptions for count in counters),
        recomputed_tokens=sum(count.recomputed_tokens for count in counters),
        spent_s=spent,
    )
