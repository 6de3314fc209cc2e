"""As many rank processes as asked for, that measure together what each of them reaches."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import msgspec

from ridgewalk.calibration.figures import RankFigures
from ridgewalk.calibration.processes import TIMEOUT_S, run_together


@dataclass(frozen=True)
class TeamTask:
    """What every rank of a team measures."""

    num_ranks: int
    num_threads: int  # of each rank
    dtypes: tuple[str, ...]
    passes: int  # over everything: a machine is slower at some times than at others
    samples: int  # of each figure in each pass
    sample_s: float
    cold_bytes: int  # weights, or KV, that calls cycle through


def measure_team(task: TeamTask) -> list[RankFigures]:
    """Figures of every rank.

    Raises:
        CalibrationError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meet"
        told = run_together(_run_rank, [(task, rank, meeting) for rank in range(task.num_ranks)])
    return [msgspec.msgpack.decode(each, type=RankFigures) for each in told]


def _run_rank(end: Connection, together: Barrier, task: TeamTask, rank: int, meeting: str) -> None:
    import torch

    from ridgewalk.calibration.rank_probes import measure_rank
    from ridgewalk.kernels.build import load_library
    from ridgewalk.parallel.process_groups import make_process_groups
    from ridgewalk.placement.mesh import Mesh

    library = load_library()
    together.wait()  # what one had to compile, the others did not wait for in a collective
    groups = make_process_groups(Mesh(task.num_ranks), rank, meeting, torch.device("cpu"), library, TIMEOUT_S)
    end.send_bytes(msgspec.msgpack.encode(measure_rank(task, groups.tp, library)))
    groups.close()
