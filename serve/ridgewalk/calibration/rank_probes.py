"""One rank measures, with its peers at the same time, everything that it can reach."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

import msgspec
import torch

from ridgewalk.calibration.collective_probes import measure_collectives
from ridgewalk.calibration.figures import CollectiveRates, RankFigures
from ridgewalk.calibration.kernel_probes import kernel_rates, make_probes
from ridgewalk.calibration.stopwatch import Sample, Stopwatch, interruptions
from ridgewalk.kernels.select import select_kernels
from ridgewalk.parallel.communicator import Communicator

BETWEEN_COLLECTIVES = "product 32"
"""What ranks compute there: so much that a collective's own time and waking up for it count for little."""

if TYPE_CHECKING:
    from ridgewalk.calibration.rank_team import TeamTask


@torch.inference_mode()
def measure_rank(
    task: TeamTask, turns: Iterable[object], ranks: Communicator, library: ctypes.CDLL | None
) -> RankFigures:
    """Measures everything once a turn.

    A kernel's time is its median over the turns: that a core is taken away now and then, too few samples of one kernel
    tell. Those of all kernels together do, and throughput is made of the slow moments too, so that every time is longer
    by their `interruptions`. Collectives are as `over_turns` says.
    """
    stopwatch = Stopwatch(ranks, task.sample_s)
    probes, torch_threads = {}, {}
    for name in task.dtypes:
        dtype = getattr(torch, name)
        kernels = select_kernels(torch.device("cpu"), library, task.num_threads, None, dtype, 16)
        torch_threads[name] = task.num_threads if kernels.needs_torch_threads(dtype) else 1
        probes[name] = make_probes(kernels, dtype, task.cold_bytes)
    samples: dict[tuple[str, str], list[Sample]] = {}
    collectives: list[CollectiveRates] = []
    for _ in turns:
        for name, some in probes.items():
            torch.set_num_threads(torch_threads[name])
            for key, probe in some.items():
                samples.setdefault((name, key), []).append(stopwatch.sample(probe.call))
        if task.collectives:
            torch.set_num_threads(torch_threads[task.dtypes[0]])
            compute = probes[task.dtypes[0]][BETWEEN_COLLECTIVES].call
            collectives.append(measure_collectives(ranks, stopwatch, compute))
    longer = 1 + interruptions(list(samples.values()))
    seconds = {key: longer * median(sample.per_call for sample in some) for key, some in samples.items()}
    kernels_by_dtype = {
        name: kernel_rates(
            {key: probe.amount / seconds[name, key] for key, probe in some.items()}, getattr(torch, name)
        )
        for name, some in probes.items()
    }
    return RankFigures(kernels_by_dtype, over_turns(collectives))


def over_turns(turns: Sequence[CollectiveRates]) -> CollectiveRates | None:
    """Medians; but the mean of straggling, for ranks wait for whichever of them is interrupted. None without turns."""
    if not turns:
        return None
    typical = CollectiveRates(*map(median, zip(*map(msgspec.structs.astuple, turns), strict=True)))
    return msgspec.structs.replace(typical, straggle=fmean(each.straggle for each in turns))
