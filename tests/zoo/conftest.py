"""What the shipped models answer on one rank, judged once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from ridgewalk.zoo import zoo_path
from ridgewalk.zoo.evaluate import Judged, judge
from ridgewalk.zoo.problems import Problem, sample_problems


@pytest.fixture(scope="session")
def fresh_problems() -> list[Problem]:
    return sample_problems(120, seed=99)


@pytest.fixture(scope="session")
def judged_on_one_rank(fresh_problems: list[Problem]) -> Callable[[str], list[Judged]]:
    """By the model's name."""
    return cache(lambda name: judge(zoo_path(name), fresh_problems))
