"""Real engines over fake ranks, whose figures are read from the text that Prometheus would get."""

from __future__ import annotations

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.request import Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.metrics.utilization import HardwarePeaks
from tests.engine.fake_ranks import FakeExecutor
from tests.metrics.builders import Clock, make_metrics, scrape, value

BLOCK_SIZE = 4


class Replica:
    """One replica of model ``m``: scheduler, block pools and recorder are the real ones. Blocks hold 4 tokens.

    It does with the recorder what `EngineLoop` does, at every step instead of ten times a second.
    """

    def __init__(
        self,
        clock: Clock,
        name: str = "0",
        num_blocks: int = 8,
        num_groups: int = 1,
        peaks: HardwarePeaks | None = None,
        **limits: int | bool,
    ) -> None:
        self.clock = clock
        config = SchedulerConfig(
            num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=num_blocks * BLOCK_SIZE, num_groups=num_groups,
            **limits,  # type: ignore[arg-type]
        )  # fmt: skip
        self.core = EngineCore(config, FakeExecutor(BLOCK_SIZE, num_groups), clock)
        mesh = {"dp": num_groups, "expert_parallel": True} if num_groups > 1 else {}
        self.metrics = make_metrics(
            name, clock=clock, peaks=peaks, block_size=BLOCK_SIZE, max_num_seqs=config.max_num_seqs, **mesh
        )
        self._awaiting_admission: list[Request] = []
        self.report()

    def ask(self, prompt: list[int], max_tokens: int) -> Request:
        """Queue a sequence."""
        request = self.core.add("r", 0, prompt, SamplingParams(max_tokens=max_tokens))
        self._awaiting_admission.append(request)
        return request

    def step(self, times: int = 1, seconds: float = 0.0) -> Replica:
        """Take in a step's result, schedule the next one, report; then so much time passes. Each ``times``."""
        for _ in range(times):
            for result in self.core.pump():
                for request in result.ended:
                    self.metrics.on_ended(request)
            for request in [each for each in self._awaiting_admission if each.first_scheduled_time is not None]:
                self._awaiting_admission.remove(request)
                assert request.first_scheduled_time is not None
                self.metrics.on_admitted(request.first_scheduled_time - request.arrival_time)
            self.report()
            self.clock.now += seconds
        return self

    def run(self) -> Replica:
        """Step until all is done."""
        while self.core.has_work:
            self.step()
        return self

    def report(self) -> None:
        """Tell the recorder the engine's state."""
        self.metrics.on_stats(self.core.stats())

    def value(self, name: str, **labels: str) -> float | None:
        """A figure of this replica's exposition; None when it is absent."""
        return value(scrape(self.metrics), name, **labels)

    def blocks(self, group: int = 0) -> tuple[float | None, ...]:
        """Used, cached and free blocks of a group."""
        text = scrape(self.metrics)
        return tuple(value(text, "kv_blocks", group=str(group), state=state) for state in ("used", "cached", "free"))


def prompt(length: int, first: int = 0) -> list[int]:
    """Tokens that no prompt with another ``first`` has."""
    return [1000 * first + position for position in range(length)]
