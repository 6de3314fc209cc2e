"""The shipped models really reason: they answer fresh problems, and the same however many ranks share them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ridgewalk.placement.mesh import Mesh
from ridgewalk.zoo import zoo_path
from ridgewalk.zoo.evaluate import Judged, expert_load, judge
from ridgewalk.zoo.problems import Problem

Judge = Callable[[str], list[Judged]]


def accuracy(judged: list[Judged]) -> float:
    return sum(j.right for j in judged) / len(judged)


@pytest.mark.parametrize("name", ["demo-dense", "demo-moe"])
def test_it_answers_fresh_problems(name: str, judged_on_one_rank: Judge) -> None:
    judged = judged_on_one_rank(name)
    assert all(j.text.startswith("<think>\n") for j in judged)
    assert accuracy(judged) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), [("demo-dense", Mesh(tp=2)), ("demo-moe", Mesh(dp=2, expert_parallel=True))])
def test_ranks_that_share_it_answer_as_one_does(
    name: str, mesh: Mesh, judged_on_one_rank: Judge, fresh_problems: list[Problem]
) -> None:
    shared = judge(zoo_path(name), fresh_problems, mesh=mesh)
    assert abs(accuracy(judged_on_one_rank(name)) - accuracy(shared)) <= 0.01


def test_all_experts_are_at_work(judged_on_one_rank: Judge) -> None:
    folder, judged = zoo_path("demo-moe"), judged_on_one_rank("demo-moe")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert max(expert_load(model, Tokenizer.from_file(str(folder / "tokenizer.json")), judged[:20])) < 2
