"""How much of the hardware a replica used in the last second, and whether want of KV keeps it from using more."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ridgewalk.placement.weights import expert_bytes

if TYPE_CHECKING:
    from ridgewalk.engine.stats import EngineStats
    from ridgewalk.placement.mesh import Mesh
    from ridgewalk.placement.model_spec import ModelSpec

WINDOW_S = 1.0
"""Rates are taken over the last so many seconds."""

TRAP_FRACTION = 0.5
"""Throttled and below this share of the highest unthrottled utilization of decoding: the capacity trap."""


@dataclass(frozen=True)
class HardwarePeaks:
    """Peak rates of one rank's device. None: not known, so no utilization of it is exported."""

    flops_per_second: float | None = None
    bytes_per_second: float | None = None  # of memory


@dataclass(frozen=True)
class _Reading:
    """Totals since the first report."""

    time: float
    flops: float  # of the whole replica, recomputed tokens excluded
    decode_flops: float  # of these, those of the tokens generated
    decode_tokens: int
    prompt_tokens: int  # computed for the first time and not generated
    bytes_read: float  # by the whole replica: weights once a step, and the KV of everything running
    throttled_seconds: float
    num_preemptions: int


class Utilization:
    """Fed with the engine's reports; a report says what happened since the one before.

    FLOPs follow `ModelSpec.flops_per_token` at the mean context of the running sequences at the time of the report,
    bytes the KV that was filled then: exact for dense weights, an estimate for attention and for routed experts.
    """

    def __init__(
        self, spec: ModelSpec, mesh: Mesh, dtype: str, num_redundant_experts: int = 0, keeps_fp8: bool = False
    ) -> None:
        self._spec = spec
        self._world_size = mesh.world_size
        self._weight_bytes = spec.weight_bytes_of_replica(mesh, dtype, num_redundant_experts, keeps_fp8)
        self._expert_bytes = 0  # of the routed experts among them, copies included
        if spec.moe:
            copies = len(spec.moe.sparse_layers) * (spec.moe.num_experts + num_redundant_experts)
            self._expert_bytes = copies * expert_bytes(spec, mesh, dtype, keeps_fp8)
        self._kv_bytes_per_token = mesh.tp * sum(spec.kv_bytes_per_token_per_stage(mesh, dtype))
        self._last: EngineStats | None = None
        self._readings: deque[_Reading] = deque()
        self._highest_unthrottled = 0.0  # FLOPs per second of decoding; 0: not known
        self._throttled_below: bool | None = None  # half of it, in the last window of decoding; None: not known

    def on_stats(self, stats: EngineStats, now: float) -> None:
        """Take in a report."""
        self._readings.append(self._read(stats, now))
        self._last = stats
        while len(self._readings) > 2 and self._readings[1].time <= now - WINDOW_S:
            self._readings.popleft()
        self._judge()

    @property
    def throttled(self) -> bool:
        """True when, within the window, work waited for KV or lost it."""
        if not self._readings or self._last is None:
            return False
        first, last = self._readings[0], self._readings[-1]
        return (
            self._last.throttled
            or last.throttled_seconds > first.throttled_seconds
            or last.num_preemptions > first.num_preemptions
        )

    @property
    def flops_per_second(self) -> float | None:
        """Of the whole replica; None before a whole window has passed."""
        seconds = self._seconds
        return None if seconds is None else (self._readings[-1].flops - self._readings[0].flops) / seconds

    @property
    def bytes_per_second(self) -> float | None:
        """Of the whole replica's memory; None before a whole window has passed."""
        seconds = self._seconds
        return None if seconds is None else (self._readings[-1].bytes_read - self._readings[0].bytes_read) / seconds

    @property
    def trapped(self) -> bool | None:
        """Throttled, at under half of the highest utilization it had unthrottled. None: not known.

        Utilization here is of decoding: FLOPs of generated tokens per second, in windows that computed no more prompt
        tokens than they generated. A prompt's tokens are computed together and reach many times the FLOPs of
        decoding, so a burst of prompts would set a mark that no decoding comes near; and in a window of decoding as
        defined, prompts take at most half of the time, since no prompt token takes longer than a generated one: they
        alone cannot bring it below half of the mark. Recomputed tokens count neither way. Windows mostly of prompts
        change nothing: what the last one of decoding said stands. The peak of the hardware cancels out, so it need
        not be known.
        """
        return self._throttled_below if self.throttled else False

    def flops_utilization(self, peaks: HardwarePeaks) -> float | None:
        """Share of the peak of all ranks; None: not known."""
        if self.flops_per_second is None or not peaks.flops_per_second:
            return None
        return self.flops_per_second / (peaks.flops_per_second * self._world_size)

    def bandwidth_utilization(self, peaks: HardwarePeaks) -> float | None:
        """Share of the peak of all ranks; None: not known."""
        if self.bytes_per_second is None or not peaks.bytes_per_second:
            return None
        return self.bytes_per_second / (peaks.bytes_per_second * self._world_size)

    def _judge(self) -> None:
        seconds, throttled = self._seconds, self.throttled
        if not throttled:
            self._throttled_below = None
        if seconds is None:
            return
        first, last = self._readings[0], self._readings[-1]
        if last.prompt_tokens - first.prompt_tokens > last.decode_tokens - first.decode_tokens:
            return
        flops = (last.decode_flops - first.decode_flops) / seconds
        if not throttled:
            self._highest_unthrottled = max(self._highest_unthrottled, flops)
        elif self._highest_unthrottled:
            self._throttled_below = flops < TRAP_FRACTION * self._highest_unthrottled

    @property
    def _seconds(self) -> float | None:
        if len(self._readings) < 2:
            return None
        seconds = self._readings[-1].time - self._readings[0].time
        return seconds if seconds >= WINDOW_S else None

    def _read(self, stats: EngineStats, now: float) -> _Reading:
        last = self._last
        if last is None:
            return _Reading(now, 0.0, 0.0, 0, 0, 0.0, stats.throttled_seconds, stats.num_preemptions)
        before = self._readings[-1]
        filled = filled_slots(stats)
        running = sum(group.num_running for group in stats.groups)
        tokens = useful_tokens(stats) - useful_tokens(last)
        generated = stats.generation_tokens - last.generation_tokens
        flops_per_token = self._spec.flops_per_token(filled // running if running else 0)
        steps, computed = stats.steps - last.steps, stats.computed_tokens - last.computed_tokens
        weight_bytes = self._weight_bytes_read(computed / steps) if steps else 0.0
        bytes_read = steps * (weight_bytes + filled * self._kv_bytes_per_token)
        return _Reading(
            now,
            before.flops + tokens * flops_per_token,
            before.decode_flops + generated * flops_per_token,
            before.decode_tokens + generated,
            before.prompt_tokens + tokens - generated,
            before.bytes_read + bytes_read,
            stats.throttled_seconds,
            stats.num_preemptions,
        )

    def _weight_bytes_read(self, tokens: float) -> float:
        """Of a step of so many tokens. One that each choose ``top_k`` of E experts at random leaves an expert
        untouched with the probability ``(1 - top_k / E) ** tokens``."""
        moe = self._spec.moe
        untouched = (1 - moe.top_k / moe.num_experts) ** tokens if moe else 0.0
        return self._weight_bytes - untouched * self._expert_bytes


def useful_tokens(stats: EngineStats) -> int:
    """Tokens computed for the first time."""
    return stats.computed_tokens - stats.recomputed_tokens


def filled_slots(stats: EngineStats) -> int:
    """Slots of used blocks that hold a computed token, shared blocks counted once."""
    return sum(group.used_blocks * stats.block_size - group.unfilled_slots for group in stats.groups)
