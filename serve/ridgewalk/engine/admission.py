"""Who may begin, and who must make way: the two decisions that KV capacity forces on the scheduler.

Every policy is first come, first served: only the head of the queue is asked about, and nobody passes it. It may begin
whenever its attention group runs nothing, so it waits at most for the sequences that run before it, each of which is
bounded by its own ``max_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from ridgewalk.engine.kv_cache_manager import PrefixHit
from ridgewalk.engine.request import Request

if TYPE_CHECKING:
    from ridgewalk.engine.scheduler import AttentionGroup


class AdmissionPolicy(Protocol):
    """Pure: no clock but the number of the step, no randomness."""

    def prepare(self, groups: Sequence[AttentionGroup], step: int) -> None:
        """Called before any other question of a step in which a request waits."""
        ...

    def admits(self, request: Request, group: AttentionGroup, hit: PrefixHit) -> bool:
        """Whether a group that has blocks for the request's known tokens should take it."""
        ...

    def on_admitted(self, request: Request, group: AttentionGroup) -> None:
        """The group has taken it."""
        ...

    def on_ended(self, request: Request) -> None:
        """A request ended, for whatever reason; ``finish_reason`` is set."""
        ...

    def victim(self, running: Sequence[Request]) -> Request:
        """Of a group that lacks a block, the request that gives up its own."""
        ...

    def answer_stands(self, step: int) -> int:
        """Steps, this one included, for which a head that was refused is refused again if no request ends."""
        ...

    def predicted_peaks(self, groups: Sequence[AttentionGroup], step: int) -> list[float | None]:
        """By group: the most KV blocks that what runs now is expected to use at one time. None: not predicted."""
        ...


class PromptOnly:
    """What vLLM does: whoever's known tokens fit may begin, and the last admitted makes way."""

    def prepare(self, groups: Sequence[AttentionGroup], step: int) -> None:
        """Nothing to prepare."""

    def admits(self, request: Request, group: AttentionGroup, hit: PrefixHit) -> bool:
        """Always: the scheduler has seen that the known tokens fit."""
        return True

    def on_admitted(self, request: Request, group: AttentionGroup) -> None:
        """Nothing to learn."""

    def on_ended(self, request: Request) -> None:
        """Nothing to learn."""

    def victim(self, running: Sequence[Request]) -> Request:
        """The last admitted."""
        return running[-1]

    def answer_stands(self, step: int) -> int:
        """Until a request ends: what runs only grows."""
        return 2**31

    def predicted_peaks(self, groups: Sequence[AttentionGroup], step: int) -> list[float | None]:
        """None for each."""
        return [None for _ in groups]


def least_loss(running: Iterable[Request]) -> Request:
    """The request whose preemption loses the least computed tokens; of equals the last admitted.

    What it lost before counts too. So a request is not preempted again and again for newer ones: sooner or later all
    that began after it have less to lose, and the one with the most to lose always runs on to its end.
    """
    return min(reversed(list(running)), key=lambda request: request.num_lost_tokens + request.num_computed_tokens)
