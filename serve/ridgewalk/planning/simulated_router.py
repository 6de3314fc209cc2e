"""Who takes a request in a simulation: our own routing policies, or vLLM's balancer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.scheduler import AttentionGroup
from ridgewalk.engine.step_meter import StepMeter
from ridgewalk.planning.replica_simulation import ReplicaSimulation
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.policy import RoutingPolicy
from ridgewalk.routing.replica_load import GroupKV, ReplicaLoad

WAITING_WEIGHT = 4
"""A waiting request weighs as much as so many running ones when a replica is chosen: vLLM's data-parallel balancer."""

REPORT_EVERY_S = 0.1
"""How old predicted peaks may be while nothing begins, and what is known of steps, as in service."""


class VllmBalancer:
    """By running and waiting requests, over KV capacity: a replica that holds more is given more."""

    def __init__(self, replicas: Sequence[ReplicaSimulation]) -> None:
        self._weighted = [(each, each.config.num_blocks * each.config.num_groups) for each in replicas]

    def choose(self, now_s: float, seq_id: int, prompt_length: int, effort: str) -> ReplicaSimulation:
        """The replica for a request that arrives now."""
        return min(self._weighted, key=lambda pair: _load(pair[0]) / pair[1])[0]


@dataclass
class _Report:
    made_s: float
    num_running: int
    peaks: list[float | None]


class SimulatedRouter:
    """One ingress with a `RoutingPolicy`. It hears of queues and of ends at once, of all else every so often."""

    def __init__(self, policy: RoutingPolicy, replicas: Sequence[ReplicaSimulation], slo: LatencySlo = NO_SLO) -> None:
        """``slo``: what every request asks for."""
        self._policy = policy
        self._slo = slo
        self._replicas = {str(index): replica for index, replica in enumerate(replicas)}
        for replica in replicas:
            replica.meter = StepMeter(replica.config.block_size)
        self._heard_s = -math.inf  # when it last heard of tokens and steps
        self._reports: dict[str, _Report] = {}
        self._open: dict[int, OpenSequence] = {}  # by seq_id

    def choose(self, now_s: float, seq_id: int, prompt_length: int, effort: str) -> ReplicaSimulation:
        """The replica for a request that arrives now."""
        for replica in self._replicas.values():
            for request in replica.take_ended():
                self._end(request)
        if now_s >= self._heard_s + REPORT_EVERY_S:
            self._hear(now_s)
        loads = [self._load(replica_id, now_s) for replica_id in self._replicas]
        sampling = next(iter(self._replicas.values())).sampling(effort)
        new = NewSequence.of(sampling, prompt_length, slo=self._slo)
        decision = self._policy.choose([new], loads, now_s)
        assert decision is not None, "a placement has at least one replica"
        self._open[seq_id] = OpenSequence(new, decision.replica_id, now_s, 0)
        self._policy.on_sent(self._open[seq_id])
        return self._replicas[decision.replica_id]

    def _hear(self, now_s: float) -> None:
        self._heard_s = now_s
        for replica_id, replica in self._replicas.items():
            steps = replica.meter.take() if replica.meter is not None else None
            if steps is not None:
                self._policy.on_steps(replica_id, replica.cost.mesh.name, steps)
            for request in replica.requests:
                self._open[request.seq_id].on_tokens(request.num_output_tokens, now_s)

    def _end(self, request: Request) -> None:
        sequence = self._open.pop(request.seq_id)
        sequence.num_output_tokens = request.num_output_tokens
        self._policy.on_ended(sequence, request.finish_reason is FinishReason.STOP)

    def _load(self, replica_id: str, now_s: float) -> ReplicaLoad:
        replica = self._replicas[replica_id]
        scheduler, config = replica.scheduler, replica.config
        report = self._reports.get(replica_id)
        running = scheduler.num_running
        if report is None or now_s >= report.made_s + REPORT_EVERY_S or running > report.num_running:
            report = self._reports[replica_id] = _Report(now_s, running, scheduler.predicted_peaks())
        return ReplicaLoad(
            replica_id,
            replica.cost.mesh.name,
            running,
            scheduler.num_waiting,
            running + scheduler.num_waiting,
            config.max_num_seqs * config.num_groups,
            tuple(_group(group, peak) for group, peak in zip(scheduler.groups, report.peaks, strict=True)),
            config.block_size,
            replica.cost.mesh.world_size,
            config.enable_prefix_caching,
        )


def _group(group: AttentionGroup, peak: float | None) -> GroupKV:
    pool = group.kv.pool
    return GroupKV(pool.num_blocks, pool.num_blocks - pool.num_used, peak)


def _load(replica: ReplicaSimulation) -> int:
    scheduler = replica.scheduler
    return scheduler.num_waiting * WAITING_WEIGHT + scheduler.num_running
