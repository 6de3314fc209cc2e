"""Runs a function as the ranks of a replica, in real processes or in threads."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import traceback
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path

import torch

from ridgewalk.kernels.build import load_library
from ridgewalk.parallel.process_groups import ProcessGroups, make_process_groups
from ridgewalk.placement.mesh import Mesh

Work = Callable[[ProcessGroups, int], object]
"""Takes a rank's groups and its flat rank."""


def _rank(work: Work, rank: int, mesh: Mesh, init: str, shared: bool, results) -> None:
    torch.set_num_threads(1)
    _work(work, rank, mesh, init, load_library() if shared else None, 20.0, results)


def _work(work: Work, rank: int, mesh: Mesh, init: str, library: CDLL | None, timeout_s: float, results) -> None:
    try:
        groups = make_process_groups(mesh, rank, init, torch.device("cpu"), library, timeout_s)
        results.put((rank, work(groups, rank)))
        groups.close()
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=3)}"))


def run_threads(
    work: Work, mesh: Mesh, folder: Path, shared: bool = True, timeout_s: float = 20.0
) -> dict[int, object]:
    """As `run_ranks`, but the ranks are threads of this process: quicker, and no less concurrent."""
    results: queue.Queue = queue.Queue()
    init = f"file://{folder}/meet-{os.urandom(4).hex()}"
    common = (mesh, init, load_library() if shared else None, timeout_s, results)
    threads = [threading.Thread(target=_work, args=(work, rank, *common)) for rank in range(mesh.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a rank hangs"
    return dict(results.get() for _ in range(results.qsize()))


def run_ranks(work: Work, mesh: Mesh, folder: Path, shared: bool) -> dict[int, object]:
    """Results of ``work`` by rank; a rank that dies has none, one that raises has the error's text."""
    if shared:
        load_library()  # compiles it, if need be, outside the time that ranks have
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once for all
    results = context.Queue()
    init = f"file://{folder}/meet-{os.urandom(4).hex()}"
    ranks = range(mesh.world_size)
    processes = [context.Process(target=_rank, args=(work, rank, mesh, init, shared, results)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert not process.is_alive(), "a rank hangs"
    gathered = {}
    while not results.empty():
        rank, result = results.get()
        gathered[rank] = result
    return gathered
