"""Admission by the predicted peak of KV use, so that preemption is the rare exception.

A group takes a request when, over all future steps t, the blocks that its running requests and the new one are expected
to hold at t stay within its KV cache:

    peak = max over t of ( sum of P(alive at t) * blocks at t  +  margin * standard deviation )

Lengths are independent of each other, so the variance at t is the sum of P (1 - P) blocks^2. P comes from a
`LengthModel` and is conditioned on what each request has written already. Time is counted in output tokens, of which
every running request writes one a step. The sum is taken on a fixed grid of times; a request holds its last block until
the next time of the grid, so that a limit which falls between two is not missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ridgewalk.engine.admission import AdmissionPolicy, PromptOnly, least_loss
from ridgewalk.engine.kv_cache_manager import PrefixHit
from ridgewalk.engine.output_lengths import Array, LengthModel, OutputLengths, length_grid
from ridgewalk.engine.request import Request
from ridgewalk.engine.scheduler_config import SchedulerConfig

if TYPE_CHECKING:
    from ridgewalk.engine.scheduler import AttentionGroup

MARGIN, MARGIN_WITH_SWAP = 2.0, 1.5
"""Standard deviations of KV use kept free beyond what is expected: fewer where a preempted request loses little, for
what is kept free is capacity given away."""

LEAST_SWAP_SHARE = 0.25
"""Of the KV cache: swap space from there on holds most of what preempted requests leave behind (half of it, all)."""

REFRESH_EVERY = 16
"""Steps for which a forecast stands while nobody comes or goes: a block of tokens for each running request."""

ROUNDING = 1e-9
"""Relative. Sums over one time and over all may round differently: what is this close is looked at as a whole."""

WHOLE = slice(None)
"""The grid of times."""


@dataclass(frozen=True)
class _Question:
    """Whether the head of the queue fits. What was answered stands while the same is asked."""

    seq_id: int
    num_cached: int  # blocks of it
    num_running: int  # beside it


@dataclass
class _Forecast:
    """KV use of one group over the grid of times, in blocks."""

    mean: Array
    variance: Array
    step: int  # when it was made
    num_running: int  # that it counts
    held: float  # by nobody in particular: shared prefixes whose first owner is gone, and steps in flight


class PredictiveAdmission:
    """Implements `AdmissionPolicy`.

    Work is bounded: a forecast takes one pass over a group's running requests, and is due when one of them has ended
    or been preempted and somebody waits, or once in `REFRESH_EVERY` steps; a candidate costs one row of it. Most
    answers are no, and for that one time at which too much is held is enough: the one where the last peak was is
    looked at before the others are.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        lengths: LengthModel | None = None,
        margin: float | None = None,
        growth: float = 1.125,
    ) -> None:
        """``growth``: of the grid of times; 1 looks at every block, for lengths that are known."""
        self._config = config
        self._lengths = lengths if lengths is not None else OutputLengths(config.max_model_len)
        swaps = config.num_swap_blocks >= LEAST_SWAP_SHARE * config.num_blocks
        self._margin = margin if margin is not None else MARGIN_WITH_SWAP if swaps else MARGIN
        # 32 bits hold any context, and take a tenth less time than 64.
        self._times = length_grid(config.max_model_len, config.block_size, growth).astype(np.int32)
        self._times_before = np.concatenate(([-1], self._times[:-1])).astype(np.int32)
        self._forecasts: dict[AttentionGroup, _Forecast] = {}
        self._peaks_at: dict[AttentionGroup, int] = {}  # where on the grid the last peak was that was asked about
        self._refusals: dict[AttentionGroup, _Question] = {}
        self._step = 0
        self._learned_at: int | None = None  # None: since the last estimate a request has ended

    def prepare(self, groups: Sequence[AttentionGroup], step: int) -> None:
        """Bring what is known of lengths up to date where it is due, and forget the forecasts that stand no more."""
        self._step = step
        if self._learned_at is None or step >= self._learned_at + REFRESH_EVERY:
            self._lengths.refresh([request for group in groups for request in group.running])
            self._learned_at = step
            self._forecasts.clear()
            self._refusals.clear()
        for group in groups:
            forecast, refusal = self._forecasts.get(group), self._refusals.get(group)
            if forecast is not None and forecast.num_running != len(group.running):
                del self._forecasts[group]
            if refusal is not None and refusal.num_running != len(group.running):
                del self._refusals[group]

    def admits(self, request: Request, group: AttentionGroup, hit: PrefixHit) -> bool:
        """Whether the predicted peak with the request fits. An idle group always takes it: nobody starves."""
        if not group.running:
            return True
        question = _Question(request.seq_id, len(hit.blocks), len(group.running))
        if self._refusals.get(group) == question:
            return False
        fits = self._fits(request, group, hit)
        if not fits:
            self._refusals[group] = question
        return fits

    def on_admitted(self, request: Request, group: AttentionGroup) -> None:
        """Add it to the group's forecast."""
        forecast = self._forecasts.get(group)
        if forecast is not None:
            mean, variance = self._use([request], [request.num_shared_blocks])
            forecast.mean += mean
            forecast.variance += variance
            forecast.num_running += 1

    def on_ended(self, request: Request) -> None:
        """Learn its length."""
        if request.first_scheduled_time is not None:
            self._lengths.observe(request)
            self._learned_at = None

    def victim(self, running: Sequence[Request]) -> Request:
        """The request that loses the least."""
        return least_loss(running)

    def answer_stands(self, step: int) -> int:
        """Until the next estimate is due."""
        return 0 if self._learned_at is None else max(0, self._learned_at + REFRESH_EVERY - step)

    def predicted_peaks(self, groups: Sequence[AttentionGroup], step: int) -> list[float | None]:
        """By group, in blocks, the margin included."""
        self.prepare(groups, step)
        for group in groups:
            if group not in self._forecasts:
                self._forecasts[group] = self._forecast(group)
        return [float(self._blocks_over_time(self._forecasts[group]).max()) for group in groups]

    def _exceeds(self, request: Request, group: AttentionGroup, hit: PrefixHit) -> bool:
        """Whether too much would be held where the last peak was: then the peak is no less."""
        index = self._peaks_at.get(group)
        if index is None:
            return False
        span = slice(index, index + 1)
        blocks = self._blocks_over_time(self._forecast(group, span), *self._use([request], [hit.num_shared], span))
        return float(blocks[0]) > group.kv.pool.num_blocks * (1 + ROUNDING)

    def _fits(self, request: Request, group: AttentionGroup, hit: PrefixHit) -> bool:
        forecast = self._forecasts.get(group)
        if forecast is None or forecast.step != self._step:
            if self._exceeds(request, group, hit):
                return False
            forecast = self._forecasts[group] = self._forecast(group)
        blocks = self._blocks_over_time(forecast, *self._use([request], [hit.num_shared]))
        self._peaks_at[group] = int(blocks.argmax())
        return float(blocks.max()) <= group.kv.pool.num_blocks

    def _forecast(self, group: AttentionGroup, span: slice = WHOLE) -> _Forecast:
        mean, variance = self._use(group.running, [request.num_shared_blocks for request in group.running], span)
        owned = sum([len(request.block_ids) - request.num_shared_blocks for request in group.running])
        held = max(0, group.kv.pool.num_used - owned)
        return _Forecast(mean, variance, self._step, len(group.running), held)

    def _blocks_over_time(self, forecast: _Forecast, mean: Array | float = 0.0, variance: Array | float = 0.0) -> Array:
        """With the margin, and with one request more."""
        more = forecast.mean + mean + self._margin * np.sqrt(forecast.variance + variance)
        blocks: Array = forecast.held + more
        return blocks

    def _use(self, requests: Sequence[Request], shared: Sequence[int], span: slice = WHOLE) -> tuple[Array, Array]:
        """Mean and variance of the blocks that requests hold over a part of the grid, less those that they share."""
        if not requests:
            return np.zeros(len(self._times[span])), np.zeros(len(self._times[span]))
        known = np.array([len(request.token_ids) for request in requests], dtype=np.int32)
        written = known - np.array([request.num_prompt_tokens for request in requests], dtype=np.int32)
        left = np.array(self._lengths.limits(requests), dtype=np.int32) - written
        times = self._times[None, span]
        last = np.maximum(left - 1, 0)[:, None]  # the last time at which it computes
        tokens = known[:, None] + np.minimum(times, last)
        blocks = -(-tokens // self._config.block_size) - np.array(shared, dtype=np.int32)[:, None]
        before = self._times_before[None, span]
        # Beyond its last time a request holds nothing; at the grid's next time it is as alive as it was then.
        alive = np.where(before < last, self._lengths.survival(requests, written, self._times[span]), 0.0)
        use = alive * blocks
        return use.sum(axis=0), (use * (blocks - use)).sum(axis=0)


def make_admission(config: SchedulerConfig) -> AdmissionPolicy:
    """The policy that a configuration names."""
    return PredictiveAdmission(config) if config.admission == "predictive" else PromptOnly()
