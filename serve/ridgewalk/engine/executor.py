"""What the engine needs of whatever computes steps: in-process, spawned processes or Ray actors."""

from __future__ import annotations

from typing import Protocol

from ridgewalk.engine.step import RankTimings, StepInput, StepOutput


class ExecutorError(RuntimeError):
    """The ranks are gone or broke: the replica cannot go on. The message names the rank and what it said."""


class Executor(Protocol):
    """Runs steps in the order they are submitted."""

    def submit(self, step: StepInput) -> None:
        """Hand a step to every rank. Does not wait for it."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when there is something to `collect`, or after ``timeout_s``."""
        ...

    def collect(self) -> list[StepOutput]:
        """Outputs that have arrived, oldest step first. Does not block.

        Raises:
            ExecutorError: a rank died or failed.
        """
        ...

    def take_timings(self) -> list[list[RankTimings]]:
        """Measured steps complete over all ranks since the last call: per step, one entry per rank."""
        ...

    def close(self) -> None:
        """End the ranks. Idempotent."""
        ...
