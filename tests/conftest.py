"""How the tests are shared out between worker processes (`make test` starts two)."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which transformers and torch do as well

ROOT = Path(__file__).parents[1]
RAY = "ray"
"""All tests that start a Ray cluster: one after the other, for each wants the whole machine at times."""


class LoadFileGroups(LoadScopeScheduling):
    """Sends each group of files to one worker. (xdist's own ``loadgroup`` does not see groups with pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return LoadFileGroups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left alone with it at the end."""
    slow = {_group(item.nodeid) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (_group(item.nodeid) != RAY, _group(item.nodeid) not in slow))


def _group(nodeid: str) -> str:
    return _group_of_file(nodeid.partition("::")[0])


@cache
def _group_of_file(path: str) -> str:
    """Files stay whole, for the sake of their fixtures; the shipped models are judged once for their folder."""
    if "pytest.mark.ray" in (ROOT / path).read_text():
        return RAY
    return "zoo" if path.startswith("tests/zoo/") else path
