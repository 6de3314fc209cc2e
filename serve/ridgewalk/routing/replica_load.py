"""What a router knows of a replica when it chooses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupKV:
    """KV cache of one attention group, in blocks."""

    total_blocks: int
    available_blocks: int  # free and evictable
    predicted_peak_blocks: float | None = None  # the most that what runs will use at one time; None: not predicted

    @property
    def peak_blocks(self) -> float:
        """What is, or will be, in use at one time."""
        used = self.total_blocks - self.available_blocks
        return used if self.predicted_peak_blocks is None else max(used, self.predicted_peak_blocks)


@dataclass(frozen=True)
class ReplicaLoad:
    """One replica: its last report, and what this ingress sent since."""

    replica_id: str
    placement: str
    num_running: int
    num_waiting: int
    num_own: int  # sequences that this ingress has open there: some of them may not be reported yet
    num_seats: int  # sequences that may run at once
    groups: tuple[GroupKV, ...]
    block_size: int = 16
    num_ranks: int = 1
    caches_prefixes: bool = True

    @property
    def num_sequences(self) -> int:
        """Running, waiting and under way. A report is up to 100 ms old; what was sent since is in `num_own` alone."""
        return max(self.num_running + self.num_waiting, self.num_own)

    @property
    def available_blocks(self) -> int:
        """Over all attention groups."""
        return sum(group.available_blocks for group in self.groups)

    @property
    def total_blocks(self) -> int:
        """Over all attention groups."""
        return sum(group.total_blocks for group in self.groups)

    @property
    def shape(self) -> tuple[int, int]:
        """Ranks, and attention groups: what tells its placement from another one's."""
        return self.num_ranks, len(self.groups)
