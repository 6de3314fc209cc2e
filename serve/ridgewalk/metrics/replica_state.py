"""What a replica tells of itself for the gauges of its whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ridgewalk.metrics.snapshot import GroupState, ReplicaState
from ridgewalk.placement.fp8_weights import kept_block, same_in_fp8
from ridgewalk.placement.mesh import Mesh

if TYPE_CHECKING:
    from ridgewalk.engine.stats import EngineStats, GroupStats
    from ridgewalk.placement.model_spec import ModelSpec
    from ridgewalk.replica.engine_config import EngineConfig


class ReplicaStateTracker:
    """Fed with the engine's reports; remembers when each group last lacked KV. Not thread-safe."""

    def __init__(self, config: EngineConfig, replica: str, spec: ModelSpec, keeps_fp8: bool = False) -> None:
        self._config = config
        self._replica = replica
        self._held_bytes, self._unique_bytes = weight_bytes(config, spec, keeps_fp8)
        self._stats: EngineStats | None = None
        self._starved_at: dict[int, float] = {}  # by attention group

    def on_stats(self, stats: EngineStats, now: float) -> None:
        """Take in a report. What happened between two reports shows in the counters."""
        for index, group in enumerate(stats.groups):
            before = self._stats.groups[index].num_throttled if self._stats else 0
            if group.throttled or group.num_throttled > before:
                self._starved_at[index] = now
        self._stats = stats

    def read(self, now: float, trapped: bool | None) -> ReplicaState:
        """The state now."""
        stats = self._stats
        groups = [
            GroupState(
                total_blocks=group.used_blocks + group.cached_blocks + group.free_blocks,
                available_blocks=group.cached_blocks + group.free_blocks,
                has_seat=group.num_running < self._config.max_num_seqs,
                starved_seconds_ago=now - self._starved_at[index] if index in self._starved_at else None,
                spare_blocks=_spare_blocks(group),
            )
            for index, group in enumerate(stats.groups if stats else [])
        ]
        return ReplicaState(
            model_name=self._config.model_name,
            placement=self._config.placement,
            replica=self._replica,
            groups=groups,
            head_of_line_blocks=stats.head_of_line_blocks if stats else 0,
            held_weight_bytes=self._held_bytes,
            unique_weight_bytes=self._unique_bytes,
            trapped=trapped,
        )


def _spare_blocks(group: GroupStats) -> int | None:
    if group.predicted_peak_blocks is None:
        return None
    return max(0, int(group.used_blocks + group.cached_blocks + group.free_blocks - group.predicted_peak_blocks))


def weight_bytes(config: EngineConfig, spec: ModelSpec, keeps_fp8: bool = False) -> tuple[int, int]:
    """Bytes of weights that a replica's ranks hold together, and of the model itself.

    Norms, repeated KV heads, what attention groups share and redundant experts count as often as they are held. Where
    the mesh dequantizes FP8 weights that one rank would keep, both are counted in the compute dtype: wider is no copy.
    """
    block = kept_block(spec, keeps_fp8)
    keeps_fp8 = block is not None and same_in_fp8(spec, config.mesh, block, config.num_redundant_experts)
    held = spec.weight_bytes_of_replica(config.mesh, config.dtype, config.num_redundant_experts, keeps_fp8)
    return held, spec.weight_bytes_of_replica(Mesh(), config.dtype, keeps_fp8=keeps_fp8)
