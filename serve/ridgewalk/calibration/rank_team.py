"""As many rank processes as asked for, that measure together what each of them reaches."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from ridgewalk.calibration.figures import RankFigures

TIMEOUT_S = 300.0


class CalibrationError(RuntimeError):
    """Something could not be measured; the message says what and why."""


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
    context = multiprocessing.get_context("spawn")  # a rank's threads begin in a process of its own
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meet'}"
        ends, processes = [], []
        for rank in range(task.num_ranks):
            own, others = context.Pipe(duplex=False)
            processes.append(context.Process(target=_run_rank, args=(task, rank, meeting, others), daemon=True))
            ends.append(own)
            processes[-1].start()
            others.close()  # so that the end of the process is seen here
        try:
            return [receive(rank, end) for rank, end in enumerate(ends)]
        finally:
            for process in processes:
                process.join(1.0)
                process.kill()


def receive(rank: int, end: Connection) -> RankFigures:
    """What a rank sends when it has measured.

    Raises:
        CalibrationError: it ended before, or takes too long.
    """
    if not end.poll(TIMEOUT_S):
        raise CalibrationError(f"rank {rank} has measured nothing within {TIMEOUT_S:.0f} s")
    try:
        told = end.recv_bytes()
    except EOFError:
        raise CalibrationError(f"rank {rank} ended before it had measured anything") from None
    return msgspec.msgpack.decode(told, type=RankFigures)


def _run_rank(task: TeamTask, rank: int, meeting: str, end: Connection) -> None:
    import torch

    from ridgewalk.calibration.rank_probes import measure_rank
    from ridgewalk.kernels.build import load_library
    from ridgewalk.parallel.process_groups import make_process_groups
    from ridgewalk.placement.mesh import Mesh

    library = load_library()
    groups = make_process_groups(Mesh(task.num_ranks), rank, meeting, torch.device("cpu"), library, TIMEOUT_S)
    end.send_bytes(msgspec.msgpack.encode(measure_rank(task, groups.tp, library)))
    groups.close()
