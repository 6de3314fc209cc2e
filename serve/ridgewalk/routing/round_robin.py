"""One replica after the other."""

from __future__ import annotations

from collections.abc import Sequence

from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.routing.decision import RoutingDecision, RoutingReason
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.replica_load import ReplicaLoad


class RoundRobin:
    """Implements `RoutingPolicy`."""

    def __init__(self) -> None:
        self._last = ""

    def choose(
        self, request: Sequence[NewSequence], loads: Sequence[ReplicaLoad], now: float
    ) -> RoutingDecision | None:
        """The next one in the order of their ids; whoever comes or goes does not disturb the others' turns."""
        ids = sorted(load.replica_id for load in loads)
        if not ids:
            return None
        self._last = next((replica_id for replica_id in ids if replica_id > self._last), ids[0])
        return RoutingDecision(self._last, RoutingReason.ONLY if len(ids) == 1 else RoutingReason.NEXT)

    def on_steps(self, replica_id: str, placement: str, steps: StepMeans) -> None:
        """Nothing to learn."""

    def on_sent(self, sequence: OpenSequence) -> None:
        """Nothing to note."""

    def on_ended(self, sequence: OpenSequence, stopped: bool) -> None:
        """Nothing to learn."""
