"""Runs a function as the ranks of a group, in real processes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import traceback
from collections.abc import Callable

import torch

from ridgewalk.kernels.build import load_library
from ridgewalk.parallel.communicator import Communicator
from ridgewalk.parallel.process_groups import make_process_groups
from ridgewalk.placement.mesh import Mesh


def _rank(work: Callable, rank: int, size: int, init: str, shared: bool, results) -> None:
    torch.set_num_threads(1)
    _work(work, rank, size, init, load_library() if shared else None, results)


def _work(work: Callable, rank: int, size: int, init: str, library, results) -> None:
    try:
        groups = make_process_groups(Mesh(tp=size), rank, init, torch.device("cpu"), library, timeout_s=20.0)
        results.put((rank, work(groups.tp)))
        groups.close()
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=3)}"))


def run_threads(work: Callable[[Communicator], object], size: int, folder) -> dict[int, object]:
    """As `run_ranks` over shared memory, but the ranks are threads of this process: quicker, and no less concurrent."""
    results = queue.Queue()
    init = f"file://{folder}/meet-{os.urandom(4).hex()}"
    library = load_library()
    threads = [threading.Thread(target=_work, args=(work, r, size, init, library, results)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a rank hangs"
    return dict(results.get() for _ in range(results.qsize()))


def run_ranks(work: Callable[[Communicator], object], size: int, folder, shared: bool) -> dict[int, object]:
    """Results of ``work`` by rank; a rank that dies has none, one that raises has the error's text."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    init = f"file://{folder}/meet-{os.urandom(4).hex()}"
    processes = [context.Process(target=_rank, args=(work, rank, size, init, shared, results)) for rank in range(size)]
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
