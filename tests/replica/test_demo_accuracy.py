"""The shipped models answer the same however many ranks share them."""

from __future__ import annotations

import pytest

from ridgewalk.placement.mesh import Mesh
from ridgewalk.zoo import zoo_path
from ridgewalk.zoo.evaluate import judge
from ridgewalk.zoo.problems import sample_problems

PROBLEMS = 200


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), [("demo-dense", Mesh(tp=2)), ("demo-moe", Mesh(dp=2, expert_parallel=True))])
def test_accuracy_is_that_of_one_rank(name: str, mesh: Mesh) -> None:
    problems = sample_problems(PROBLEMS, seed=99)
    one, two = (
        sum(judged.right for judged in judge(zoo_path(name), problems, mesh=shape)) / PROBLEMS
        for shape in (Mesh(), mesh)
    )
    assert one >= 0.95
    assert abs(one - two) <= 0.01
