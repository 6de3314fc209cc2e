"""Replicas and requests for routing tests."""

from __future__ import annotations

from dataclasses import replace

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.routing.kv_growth import KvGrowth
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.replica_load import GroupKV, ReplicaLoad
from ridgewalk.routing.step_pace import StepPace

MAX_MODEL_LEN = 8192
MAX_TOKENS = 4096
PACES = {"TP1": StepPace(0.016, 2e-5, 8e-7, 1e-4), "TP4": StepPace(0.006, 2e-5, 2e-7, 3e-5)}
"""About a 32B model on one H200, and on four of them."""


def new(
    effort: str = "",
    prompt: int = 100,
    prefix: tuple[int, ...] = (),
    stops: tuple[int, ...] = (1,),
    slo: LatencySlo = NO_SLO,
) -> NewSequence:
    sampling = SamplingParams(max_tokens=MAX_TOKENS, reasoning_effort=effort, stop_token_ids=stops)
    return NewSequence.of(sampling, prompt, prefix=prefix, slo=slo)


def replica(
    replica_id: str,
    running: int = 0,
    waiting: int = 0,
    used: int = 0,
    total: int = 10_000,
    peak: float | None = None,
    placement: str = "TP1",
    seats: int = 256,
    own: int = 0,
    groups: int = 1,
) -> ReplicaLoad:
    group = GroupKV(total, total - used, peak)
    ranks = int(placement[2:])
    return ReplicaLoad(replica_id, placement, running, waiting, own, seats, (group,) * groups, 16, ranks)


def with_group(load: ReplicaLoad, **changes: float) -> ReplicaLoad:
    return replace(load, groups=tuple(replace(group, **changes) for group in load.groups))  # type: ignore[arg-type]


def taught(short: int = 150, long: int = 3000, count: int = 1000) -> KvGrowth:
    """A policy that has seen a tenth of the requests, those of high effort, write much more."""
    policy = KvGrowth(MAX_MODEL_LEN)
    teach_paces(policy)
    for number in range(count):
        effort, length = ("high", long) if number % 10 == 0 else ("low", short)
        finish(policy, send(policy, new(effort), "gone", 0.0), length)
    return policy


def teach_paces(policy: KvGrowth) -> None:
    """Steps of many kinds, as each placement would take them."""
    for placement, pace in PACES.items():
        for sequences in (1, 10, 100):
            for blocks in (10 * sequences, 50 * sequences):
                for prefill in (0, 1000):
                    seconds = pace.step_s(sequences, blocks) + prefill * pace.prefill_token_s
                    policy.on_steps("gone", placement, StepMeans(100, seconds, sequences, blocks, prefill))


def send(policy: KvGrowth, sequence: NewSequence, replica_id: str, now: float) -> OpenSequence:
    sent = OpenSequence(sequence, replica_id, now, sequence.num_resumed_tokens)
    policy.on_sent(sent)
    return sent


def finish(policy: KvGrowth, sequence: OpenSequence, length: int, stopped: bool = True) -> None:
    sequence.num_output_tokens = length
    policy.on_ended(sequence, stopped)
