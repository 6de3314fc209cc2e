"""How the threads of a kernel divide its units: each is done once, and what comes next is a neighbour."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from ridgewalk import kernels
from ridgewalk.kernels.build import FLAGS


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("harness") / "unit_runs.so"
    compiler, include = os.environ.get("CXX", "g++"), Path(kernels.__file__).parent
    source = Path(__file__).with_name("unit_runs.cpp")
    subprocess.run([compiler, *FLAGS, "-shared", f"-I{include}", str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("units", [0, 1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("slow", [-1, 0])
def test_every_unit_is_done_once_and_the_next_is_its_neighbour(
    library: ctypes.CDLL, threads: int, units: int, slow: int
) -> None:
    """With a first unit that lasts until all others are done, other threads do what its own would have done."""
    done, apart = (ctypes.c_int * units)(), (ctypes.c_int64 * units)()
    library.count_units(threads, ctypes.c_int64(units), ctypes.c_int64(slow), done, apart)
    assert list(done) == [1] * units
    assert set(apart) <= {-1, 0, 1}


def test_others_steal_from_a_thread_that_is_slow_from_the_back(library: ctypes.CDLL) -> None:
    units = 64
    done, apart = (ctypes.c_int * units)(), (ctypes.c_int64 * units)()
    library.count_units(2, ctypes.c_int64(units), ctypes.c_int64(0), done, apart)
    assert list(apart[2:32]) == [-1] * 30
    assert (apart[0], apart[1]) in ((1, 0), (0, -1))  # the last one has no neighbour left; it may even be the slow one
    assert list(apart[32:]) == [1] * 31 + [0]
