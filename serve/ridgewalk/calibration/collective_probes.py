"""What the collectives between the ranks of this machine cost, over the transport that the engine chooses here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ridgewalk.calibration.figures import CollectiveRates
from ridgewalk.calibration.stopwatch import Stopwatch
from ridgewalk.parallel.communicator import Communicator

WIDTH = 512
FEW_ROWS, MANY_ROWS = 2, 512
"""BF16 rows of `WIDTH` in an exchange."""

FEW_BYTES, MANY_BYTES = 2 * WIDTH * FEW_ROWS, 2 * WIDTH * MANY_ROWS

CALLS = 64
"""In a row, as a sample: of collectives, alone or with products between them."""


def measure_collectives(ranks: Communicator, stopwatch: Stopwatch, compute: Callable[[], object]) -> CollectiveRates:
    """Latency: seconds of an exchange of few rows; bandwidth: what many rows take beyond it. Of several ranks.

    ``compute`` is what ranks do between collectives: then each waits for the last, and a core's pace is not even.
    """
    reduced = [_all_reduce_s(ranks, stopwatch, rows) for rows in (FEW_ROWS, MANY_ROWS)]
    exchanged = [_all_to_all_s(ranks, stopwatch, rows) for rows in (FEW_ROWS, MANY_ROWS)]
    beyond, share = MANY_BYTES - FEW_BYTES, (ranks.size - 1) / ranks.size
    return CollectiveRates(
        all_reduce_latency_s=reduced[0],
        all_reduce_bandwidth=2 * share * beyond / max(1e-9, reduced[1] - reduced[0]),
        all_to_all_latency_s=exchanged[0],
        all_to_all_bandwidth=share * beyond / max(1e-9, exchanged[1] - exchanged[0]),
        straggle=_straggle(ranks, stopwatch, compute, reduced[0]),
    )


def _straggle(ranks: Communicator, stopwatch: Stopwatch, compute: Callable[[], object], all_reduce_s: float) -> float:
    """Of one stretch of time: what a rank computes and what passes are of the same pace of its core."""
    values = torch.zeros(FEW_ROWS, WIDTH, dtype=torch.bfloat16)
    passed, computed = stopwatch.seconds_meeting(compute, lambda: ranks.all_reduce(values), CALLS)
    return (passed - all_reduce_s) / computed - 1


def _all_reduce_s(ranks: Communicator, stopwatch: Stopwatch, rows: int) -> float:
    values = torch.zeros(rows, WIDTH, dtype=torch.bfloat16)
    return stopwatch.seconds_together(lambda: ranks.all_reduce(values), CALLS)


def _all_to_all_s(ranks: Communicator, stopwatch: Stopwatch, rows: int) -> float:
    values = torch.zeros(rows, WIDTH, dtype=torch.bfloat16)
    counts = torch.tensor([rows * (rank + 1) // ranks.size - rows * rank // ranks.size for rank in range(ranks.size)])
    return stopwatch.seconds_together(lambda: ranks.all_to_all(values, counts, "dispatch"), CALLS)
