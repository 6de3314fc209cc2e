"""The shape of a replica's ranks: ``dp x pp x tp``, and how a flat rank number maps onto it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """Ranks of one replica. Ranks are numbered tp fastest, then dp, then pp, so that a pipeline stage is contiguous.

    ``dp`` is data parallelism of attention inside the replica (for expert-parallel models); a dense model scales by
    replicas instead.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        """The placement name of one replica of this shape, e.g. ``TP2``, ``PP4xTP2``, ``DP2xEP2``."""
        parts = [f"DP{self.dp}"] if self.dp > 1 else []
        if self.pp > 1:
            parts.append(f"PP{self.pp}")
        if self.tp > 1 or not (parts or self.expert_parallel):
            parts.append(f"TP{self.tp}")
        if self.expert_parallel:
            parts.append(f"EP{self.dp * self.tp}")
        return "x".join(parts)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """``(dp, pp, tp)`` indices of a flat rank.

        Raises:
            ValueError: the rank is outside the mesh.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a mesh of {self.world_size} ranks")
        tp = rank % self.tp
        dp = rank // self.tp % self.dp
        pp = rank // (self.tp * self.dp)
        return dp, pp, tp


def placement_name(replicas: int, mesh: Mesh) -> str:
    """Name of ``replicas x mesh``: ``TP2``, ``DP4xTP2`` (dense data parallelism is replicas), ``2xDP2xEP2``."""
    if replicas == 1:
        return mesh.name
    if mesh.expert_parallel or mesh.dp > 1:
        return f"{replicas}x{mesh.name}"
    return f"DP{replicas}" if mesh.name == "TP1" else f"DP{replicas}x{mesh.name}"
