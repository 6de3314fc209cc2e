"""The replica with the fewest sequences per seat."""

from __future__ import annotations

import math
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


def least_loaded(loads: Sequence[ReplicaLoad], count: int = 0, sequence_tokens: float = 0.0) -> RoutingDecision | None:
    """The replica for a new request; None when there is none.

    A replica with waiting sequences is chosen only when all have some. Otherwise sequences per seat decide, so that
    replicas of unequal size fill evenly; ties go to the largest share of available KV.

    With ``sequence_tokens``, what each of the request's ``count`` sequences is expected to hold at its end, only seats
    that KV has room for count, if all sequences were like these, and the request itself is counted as there.
    """
    if not loads:
        return None
    shares = {load.replica_id: (load.num_sequences + count) / _seats(load, sequence_tokens) for load in loads}

    def key(load: ReplicaLoad) -> tuple[bool, float, float]:
        available = load.available_blocks / max(load.total_blocks, 1)
        return load.num_waiting > 0, shares[load.replica_id], -available

    best = min(loads, key=key)
    if len(loads) == 1:
        return RoutingDecision(best.replica_id, RoutingReason.ONLY)
    full = best.num_waiting > 0 or (sequence_tokens > 0 and shares[best.replica_id] > 1)
    return RoutingDecision(best.replica_id, RoutingReason.ALL_FULL if full else RoutingReason.LEAST_LOADED)


def _seats(load: ReplicaLoad, sequence_tokens: float) -> float:
    if sequence_tokens <= 0:
        return max(load.num_seats, 1)
    # A sequence lives in one attention group. A group too small for one is worth a part of a seat, lest all be alike.
    fitting = [group.total_blocks * load.block_size / sequence_tokens for group in load.groups]
    with_room = sum(math.floor(each) if each >= 1 else each for each in fitting)
    return max(min(load.num_seats, with_room), 1e-9)
