"""The routing policies, by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.routing.decision import RoutingDecision, RoutingName
from ridgewalk.routing.kv_growth import KvGrowth
from ridgewalk.routing.least_loaded import LeastLoaded
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.replica_load import ReplicaLoad
from ridgewalk.routing.round_robin import RoundRobin


class RoutingPolicy(Protocol):
    """Chooses for one model at one ingress. Called from one thread; times are any monotonic seconds."""

    def choose(
        self, request: Sequence[NewSequence], loads: Sequence[ReplicaLoad], now: float
    ) -> RoutingDecision | None:
        """The replica for all sequences of a request; None only when ``loads`` is empty."""
        ...

    def on_steps(self, replica_id: str, placement: str, steps: StepMeans) -> None:
        """A replica of a placement reports its steps."""
        ...

    def on_sent(self, sequence: OpenSequence) -> None:
        """A sequence is on its way to the replica that was chosen."""
        ...

    def on_ended(self, sequence: OpenSequence, stopped: bool) -> None:
        """Nothing more comes of a sequence; ``stopped``: because it ended by itself."""
        ...


def make_policy(name: RoutingName, max_model_len: int) -> RoutingPolicy:
    """A policy that has seen nothing. ``max_model_len``: tokens of the longest sequence."""
    if name == "kv_growth":
        return KvGrowth(max_model_len)
    return LeastLoaded() if name == "least_loaded" else RoundRobin()
