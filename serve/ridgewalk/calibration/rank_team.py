"""As many rank processes as asked for, that measure together what each of them reaches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from ridgewalk.calibration.figures import RankFigures
from ridgewalk.calibration.team import TIMEOUT_S, Team, Turns


@dataclass(frozen=True)
class TeamTask:
    """What every rank of a team measures."""

    num_ranks: int
    num_threads: int  # of each rank
    dtypes: tuple[str, ...]
    sample_s: float  # of each figure, in a turn
    cold_bytes: int  # weights, or KV, that calls cycle through
    collectives: bool = False  # measured too


class RankTeam(Team):
    """Ranks that measure kernels and collectives; they meet at a file of ``folder``."""

    def __init__(self, task: TeamTask, folder: Path) -> None:
        meeting = f"file://{folder}/meet-{task.num_ranks}"
        ranks, threads = task.num_ranks, task.num_threads
        who = f"{ranks} rank{'s' * (ranks > 1)} of {threads} thread{'s' * (threads > 1)}"
        super().__init__(
            f"products, experts, attention{', collectives' * task.collectives}, {who}",
            _run_rank,
            [(task, rank, meeting) for rank in range(task.num_ranks)],
        )
        self.num_processes = task.num_ranks

    def figures(self) -> list[RankFigures]:
        """Of every rank, when it has finished."""
        return [msgspec.msgpack.decode(each, type=RankFigures) for each in self.told]


def _run_rank(turns: Turns, task: TeamTask, rank: int, meeting: str) -> None:
    import torch

    from ridgewalk.calibration.rank_probes import measure_rank
    from ridgewalk.kernels.build import load_library
    from ridgewalk.parallel.process_groups import make_process_groups
    from ridgewalk.placement.mesh import Mesh

    library = load_library()
    turns.together()  # what one had to compile, the others did not wait for in a collective
    groups = make_process_groups(Mesh(task.num_ranks), rank, meeting, torch.device("cpu"), library, TIMEOUT_S)
    turns.tell(msgspec.msgpack.encode(measure_rank(task, turns, groups.tp, library)))
    groups.close()
