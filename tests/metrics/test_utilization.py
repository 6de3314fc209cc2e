"""The capacity trap as a replica sees it."""

from __future__ import annotations

from ridgewalk.engine.stats import GroupStats
from ridgewalk.metrics.utilization import Utilization
from tests.metrics.builders import make_plan, make_spec, make_stats


class Engine:
    """Reports every 0.1 s at a rate of tokens."""

    def __init__(self) -> None:
        spec = make_spec()
        self.utilization = Utilization(spec, make_plan(spec), 1)
        self.now, self.tokens, self.recomputed, self.throttled_seconds = 0.0, 0, 0, 0.0
        self.report(throttled=False)

    def run(self, seconds: float, rate: int, throttled: bool = False, recomputed_rate: int = 0) -> Utilization:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            self.tokens += (rate + recomputed_rate) // 10
            self.recomputed += recomputed_rate // 10
            self.throttled_seconds += 0.1 * throttled
            self.report(throttled)
        return self.utilization

    def report(self, throttled: bool) -> None:
        self.utilization.on_stats(
            make_stats(
                [GroupStats(1, 0, 99, 0, 1)], computed_tokens=self.tokens, recomputed_tokens=self.recomputed,
                throttled=throttled, throttled_seconds=self.throttled_seconds,
            ),
            self.now,
        )  # fmt: skip


def test_throttled_below_half_of_the_highest_is_the_trap() -> None:
    engine = Engine()
    assert engine.run(2, 1000).trapped is False
    assert engine.run(2, 600, throttled=True).trapped is False
    assert engine.run(2, 400, throttled=True).trapped is True
    assert engine.run(2, 400).trapped is False  # slow for want of work


def test_recomputed_tokens_are_not_use() -> None:
    engine = Engine()
    engine.run(2, 1000)
    assert engine.run(2, 400, throttled=True, recomputed_rate=900).trapped is True


def test_a_replica_that_was_never_unthrottled_does_not_know() -> None:
    assert Engine().run(3, 100, throttled=True).trapped is None


def test_rates_are_those_of_the_last_second() -> None:
    engine = Engine()
    assert engine.run(0.5, 1000).flops_per_second is None
    engine.run(3, 1000)
    per_token = make_spec().flops_per_token(16)
    assert round((engine.run(3, 200).flops_per_second or 0) / per_token) == 200
