"""Compiling at first use: cached, safe between processes, and never in the way when it fails."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ridgewalk.kernels import build
from ridgewalk.kernels.build import BuildError, build_library, load_library
from ridgewalk.kernels.kernel_set import HeadLayout
from ridgewalk.kernels.select import select_kernels

FAKE_COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec echo fake 1.0
echo "$@" >> {log}
sleep 0.1
while [ "$1" != -o ]; do shift; done
echo compiled > "$2"
"""


@pytest.fixture
def fake_compiler(monkeypatch, tmp_path):
    """A compiler that only writes its output file; the path of its log of calls."""
    path, log = tmp_path / "g++", tmp_path / "calls"
    path.write_text(FAKE_COMPILER.format(log=log))
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return log


def test_ranks_that_compile_at_once_compile_once(fake_compiler, tmp_path):
    with ThreadPoolExecutor(4) as ranks:
        paths = set(ranks.map(build_library, [tmp_path / "cache"] * 4))
    assert len(paths) == 1
    assert paths.pop().read_text() == "compiled\n"
    sources = list(Path(build.__file__).parent.glob("*.cpp"))
    calls = fake_compiler.read_text().splitlines()
    assert len(calls) == len(sources) + 1  # and one to link
    build_library(tmp_path / "cache")
    assert len(fake_compiler.read_text().splitlines()) == len(calls)


def test_another_compiler_makes_another_library(fake_compiler, tmp_path, monkeypatch):
    first = build_library(tmp_path / "cache")
    path = tmp_path / "g++"
    path.write_text(path.read_text().replace("fake 1.0", "fake 2.0"))
    assert build_library(tmp_path / "cache") != first


def test_without_a_compiler_torch_takes_over_with_one_warning(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        library = load_library()
    assert library is None
    assert len(caplog.records) == 1
    assert select_kernels(torch.device("cpu"), library, 1, HeadLayout(2, 1, 16), torch.float32, 4).name == "torch"


def test_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\necho it is broken >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(BuildError, match="it is broken"):
        build_library(tmp_path / "cache")


def test_unwritable_cache_is_survived(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RIDGEWALK_CACHE", str(tmp_path / "file" / "cache"))
    assert load_library() is None
