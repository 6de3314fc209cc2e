"""The replica with the fewest sequences per seat."""

from __future__ import annotations

from collections.abc import Sequence

from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.routing.decision import RoutingDecision, RoutingReason
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.replica_load import ReplicaLoad


class LeastLoaded:
    """Implements `RoutingPolicy`; remembers nothing."""

    def choose(
        self, request: Sequence[NewSequence], loads: Sequence[ReplicaLoad], now: float
    ) -> RoutingDecision | None:
        """See `least_loaded`."""
        return least_loaded(loads)

    def on_steps(self, replica_id: str, placement: str, steps: StepMeans) -> None:
        """Nothing to learn."""

    def on_sent(self, sequence: OpenSequence) -> None:
        """Nothing to note."""

    def on_ended(self, sequence: OpenSequence, stopped: bool) -> None:
        """Nothing to learn."""


def least_loaded(loads: Sequence[ReplicaLoad], sequence_tokens: float = 0.0) -> RoutingDecision | None:
    """The replica for a new request; None when there is none.

    A replica with waiting sequences is chosen only when all have some. Otherwise sequences per seat decide, so that
    replicas of unequal size fill evenly; ties go to the largest share of available KV. With ``sequence_tokens``, what a
    sequence is expected to hold at its end, only seats that the KV cache has room for count.
    """
    if not loads:
        return None
    best = min(loads, key=lambda load: _key(load, sequence_tokens))
    if len(loads) == 1:
        return RoutingDecision(best.replica_id, RoutingReason.ONLY)
    full = best.num_waiting > 0
    return RoutingDecision(best.replica_id, RoutingReason.ALL_FULL if full else RoutingReason.LEAST_LOADED)


def _key(load: ReplicaLoad, sequence_tokens: float) -> tuple[bool, float, float]:
    seats: float = load.num_seats
    if sequence_tokens > 0:
        seats = min(seats, load.total_blocks * load.block_size / sequence_tokens)
    share = load.num_sequences / max(seats, 1)
    return load.num_waiting > 0, share, -load.available_blocks / max(load.total_blocks, 1)
