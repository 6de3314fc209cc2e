"""`EngineMetrics`: what one engine replica records."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from ridgewalk.metrics import catalogue
from ridgewalk.metrics.collectives import split_collectives
from ridgewalk.metrics.expert_load import ExpertLoad
from ridgewalk.metrics.families import CounterFamily, HistogramFamily, SummaryFamily, counters, gauges
from ridgewalk.metrics.replica_state import ReplicaStateTracker
from ridgewalk.metrics.snapshot import encode, relabeled, take_snapshot
from ridgewalk.metrics.utilization import HardwarePeaks, Utilization

if TYPE_CHECKING:
    from ridgewalk.engine.request import Request
    from ridgewalk.engine.stats import EngineStats, GroupStats
    from ridgewalk.engine.step import RankTimings
    from ridgewalk.placement.model_spec import ModelSpec
    from ridgewalk.replica.engine_config import EngineConfig

_TOTALS = (
    (catalogue.NUM_PREEMPTIONS, "num_preemptions"),
    (catalogue.RECOMPUTED_TOKENS, "recomputed_tokens"),
    (catalogue.KV_BLOCKS_SWAPPED_OUT, "swapped_out_blocks"),
    (catalogue.KV_BLOCKS_SWAPPED_IN, "swapped_in_blocks"),
    (catalogue.PREFIX_CACHE_QUERIES, "prefix_cache_queries"),
    (catalogue.PREFIX_CACHE_HITS, "prefix_cache_hits"),
    (catalogue.PROMPT_TOKENS, "prompt_tokens"),
    (catalogue.GENERATION_TOKENS, "generation_tokens"),
    (catalogue.ENGINE_STEPS, "steps"),
    (catalogue.KV_THROTTLED_SECONDS, "throttled_seconds"),
)
"""Counters that the engine keeps itself, and their fields in `EngineStats`."""


class EngineMetrics(Collector):
    """Implements `replica.engine_loop.StepRecorder`: recorded on the engine's thread, read from any other.

    ``replica`` is Serve's rank of the replica, ``current_rank`` gives the one that it has now. ``clock`` is any
    monotonic seconds.
    """

    def __init__(
        self,
        config: EngineConfig,
        replica: str,
        spec: ModelSpec,
        peaks: HardwarePeaks = HardwarePeaks(),  # noqa: B008 (frozen)
        clock: Callable[[], float] = time.monotonic,
        keeps_fp8: bool = False,
        current_rank: Callable[[], str] | None = None,
    ) -> None:
        self._config = config
        self._replica = replica
        self._current_rank = current_rank or (lambda: replica)
        self._constant = constant = (config.model_name, config.placement, replica)
        self._peaks = peaks
        self._clock = clock
        self._lock = threading.Lock()  # of the four below
        self._stats: EngineStats | None = None
        self._utilization = Utilization(spec, config.mesh, config.dtype, config.num_redundant_experts, keeps_fp8)
        self._expert_load = ExpertLoad(config.mesh)
        self._state = ReplicaStateTracker(config, replica, spec, keeps_fp8)
        self._queue_time = HistogramFamily(catalogue.REQUEST_QUEUE_TIME, constant)
        self._ended = CounterFamily(catalogue.SEQUENCES_ENDED, constant)
        self._collectives = HistogramFamily(catalogue.COLLECTIVE_SECONDS, constant)
        self._bubbles = CounterFamily(catalogue.PIPELINE_BUBBLE, constant)
        self._routed_tokens = CounterFamily(catalogue.ROUTED_TOKENS, constant)
        self._routed_bytes = CounterFamily(catalogue.ROUTED_BYTES, constant)
        self._steps = SummaryFamily(catalogue.STEP_SECONDS, constant)
        self._queue_time.observe((), 0.0, times=0)
        for reason in catalogue.FINISH_REASONS:
            self._ended.add((reason,), 0)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    # -- on the engine's thread -------------------------------------------------------------------------------------

    def on_admitted(self, queue_seconds: float) -> None:
        """A sequence was scheduled for the first time, so long after it arrived."""
        self._queue_time.observe((), queue_seconds)

    def on_ended(self, request: Request) -> None:
        """A sequence ended."""
        if request.finish_reason is not None:
            self._ended.add((request.finish_reason.value,))

    def on_timings(self, ranks: list[RankTimings]) -> None:
        """A measured step, one entry per rank."""
        mesh = self._config.mesh
        self._collectives.observe_all(split_collectives(ranks, mesh).items())
        self._steps.observe_all(pair for timings in ranks for pair in _phases(timings))
        for timings in ranks:
            rank = (str(timings.rank),)
            if mesh.pp > 1:
                self._bubbles.add(rank, timings.bubble_seconds)
            if mesh.expert_parallel:
                self._routed_tokens.add(rank, timings.routed_tokens)
                self._routed_bytes.add(rank, timings.routed_bytes)
        with self._lock:
            self._expert_load.on_timings(ranks)

    def on_stats(self, stats: EngineStats) -> None:
        """The engine's state now."""
        now = self._clock()
        with self._lock:
            self._stats = stats
            self._utilization.on_stats(stats, now)
            self._state.on_stats(stats, now)

    # -- on any thread ----------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """Everything recorded, encoded for `exposition.merge`."""
        with self._lock:
            state = self._state.read(self._clock(), self._utilization.trapped)
        snapshot, rank = take_snapshot(self.registry, state), self._current_rank()
        return encode(snapshot if rank == self._replica else relabeled(snapshot, "replica", rank))

    def collect(self) -> Iterator[Metric]:
        """The metrics now, for the registry."""
        with self._lock:
            stats = self._stats
            flops = self._utilization.flops_utilization(self._peaks)
            bandwidth = self._utilization.bandwidth_utilization(self._peaks)
            imbalance = self._expert_load.imbalance()
        if stats is not None:
            yield from self._collect_stats(stats)
        for spec, value in (
            (catalogue.MODEL_FLOPS_UTILIZATION, flops),
            (catalogue.MODEL_BANDWIDTH_UTILIZATION, bandwidth),
        ):
            if value is not None:
                yield gauges(spec, [(self._constant, value)])
        if imbalance is not None:
            scopes = imbalance._asdict().items()
            yield gauges(catalogue.EXPERT_LOAD_IMBALANCE, [((*self._constant, *each[:1]), each[1]) for each in scopes])
        for family in (
            self._queue_time, self._ended, self._collectives, self._bubbles, self._routed_tokens, self._routed_bytes,
            self._steps,
        ):  # fmt: skip
            yield family.collect()
        config = self._config
        mesh = (str(config.tp), str(config.pp), str(config.dp))
        yield gauges(catalogue.PLACEMENT_INFO, [((*self._constant, *mesh, config.dtype, config.device), 1)])

    def _collect_stats(self, stats: EngineStats) -> Iterator[Metric]:
        constant, groups = self._constant, stats.groups
        running = sum(group.num_running for group in groups)
        used = sum(group.used_blocks for group in groups)
        total = sum(_total_blocks(group) for group in groups)
        unfilled = sum(group.unfilled_slots for group in groups)
        for spec, value in (
            (catalogue.NUM_REQUESTS_RUNNING, running),
            (catalogue.NUM_REQUESTS_WAITING, stats.num_waiting),
            (catalogue.KV_CACHE_USAGE, used / total),
            (catalogue.KV_INTERNAL_FRAGMENTATION, unfilled / (used * stats.block_size) if used else 0.0),
        ):
            yield gauges(spec, [(constant, value)])
        yield gauges(
            catalogue.KV_BLOCKS,
            [
                ((*constant, str(index), state), value)
                for index, group in enumerate(groups)
                for state, value in (
                    ("used", group.used_blocks),
                    ("cached", group.cached_blocks),
                    ("free", group.free_blocks),
                )
            ],
        )
        peaks = [
            ((*constant, str(index)), group.predicted_peak_blocks / _total_blocks(group))
            for index, group in enumerate(groups)
            if group.predicted_peak_blocks is not None
        ]
        if peaks:
            yield gauges(catalogue.KV_PREDICTED_PEAK, peaks)
        if stats.swap_blocks:
            yield gauges(catalogue.KV_SWAP_USAGE, [(constant, stats.used_swap_blocks / stats.swap_blocks)])
        for spec, field in _TOTALS:
            yield counters(spec, [(constant, getattr(stats, field))])


def _total_blocks(group: GroupStats) -> int:
    return group.used_blocks + group.cached_blocks + group.free_blocks


def _phases(timings: RankTimings) -> Iterator[tuple[tuple[str, str, str], float]]:
    """Labels and seconds of each phase; ``other`` is what the rank's phases leave of its step."""
    rank = str(timings.rank)
    for phase, seconds in timings.phases.items():
        yield (phase, rank, "true"), seconds
    yield ("other", rank, "true"), max(0.0, timings.seconds - sum(timings.phases.values()))
