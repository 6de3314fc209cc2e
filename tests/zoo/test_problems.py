"""The generated problems: their arithmetic, their splits, and the judge."""

from __future__ import annotations

import itertools
import math
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.zoo.data import SMALL_TALK, make_example
from ridgewalk.zoo.problems import (
    KINDS,
    Problem,
    easy_problems,
    generate,
    is_right,
    sample_problems,
    split_of,
)
from ridgewalk.zoo.working import add_lines, multiply_lines, subtract_lines

EQUATION = re.compile(r"(\d+(?: [-+*] \d+)+) = (-?\d+)(?![\d ]*[-+*])")


def _value(expression: str) -> int:
    """The value of digits joined by `+`, `-` and `*`, read apart from the code under test."""
    terms = re.findall(r"[-+]?\d+(?:\*\d+)*", expression.replace(" ", ""))
    return sum(math.prod(map(int, term.split("*"))) for term in terms)


@given(st.integers(0, 99999), st.integers(0, 99999))
def test_worked_sum_and_difference_end_in_the_result(a: int, b: int) -> None:
    assert add_lines(a, b)[-1] == f"{a} + {b} = {a + b}"
    assert subtract_lines(a, b)[-1] == f"{a} - {b} = {a - b}"


@given(st.integers(0, 9999), st.integers(0, 99))
def test_worked_product_ends_in_the_result(a: int, b: int) -> None:
    assert multiply_lines(a, b)[-1] == f"{a} * {b} = {a * b}"


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_equation_of_the_reasoning_holds_and_the_last_gives_the_answer(kind: str) -> None:
    rng = random.Random(3)
    for _ in range(200):
        problem = generate(rng, "train", kind)
        last_line = problem.reasoning.splitlines()[-1]
        assert last_line.rpartition(" = ")[2] == problem.answer
        for expression, result in EQUATION.findall(problem.reasoning):
            assert _value(expression) == int(result), problem.reasoning


@pytest.mark.parametrize("kind", list(KINDS))
def test_accumulated_digits_reach_the_result(kind: str) -> None:
    """What stands after the last arrow of each block is the result of that block, zeros in front aside."""
    problem = generate(random.Random(5), "test", kind)
    lines = problem.reasoning.splitlines()
    for line, following in itertools.pairwise(lines):
        if "->" in line and "->" not in following:
            assert int(line.rpartition("-> ")[2]) == int(following.rpartition(" = ")[2])


def test_questions_with_plain_operands_are_answered_right() -> None:
    """An independent reading of the question, where it is a plain expression."""
    checked = 0
    for problem in sample_problems(600, seed=9):
        expression = re.search(r"\d+( ?[-+*x×] ?\d+)+", problem.question)
        if problem.kind in ("add", "sub", "mul", "sum") and expression:
            text = expression.group().replace("x", "*").replace("×", "*")
            assert str(_value(text)) == problem.answer, problem.question
            checked += 1
    assert checked > 200


def test_splits_share_no_operands() -> None:
    train = {(p.kind, p.operands) for p in sample_problems(3000, seed=1, split="train")}
    test = {(p.kind, p.operands) for p in sample_problems(3000, seed=2, split="test")}
    assert not train & test
    assert all(split_of(*key) == "train" for key in train)
    assert all(split_of(*key) == "test" for key in test)


def test_training_conversations_ask_no_test_question() -> None:
    rng = random.Random(0)
    prompts = "".join(make_example(rng).prompt for _ in range(3000))
    asked = set(re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompts)) - set(SMALL_TALK)
    fresh = {p.question for p in sample_problems(3000, seed=2)} | {p.question for p in easy_problems(300, seed=2)}
    assert asked
    assert not asked & fresh


def test_the_split_does_not_depend_on_the_process() -> None:
    code = (
        "from ridgewalk.zoo.problems import sample_problems; print([p.question for p in sample_problems(20, seed=4)])"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert seen == {f"{[p.question for p in sample_problems(20, seed=4)]}\n"}


def test_samples_are_distinct_and_of_every_kind() -> None:
    problems = sample_problems(500, seed=0)
    assert len({p.question for p in problems}) == 500
    assert {p.kind for p in problems} == set(KINDS)


def test_the_judge_wants_exactly_the_answer() -> None:
    problem = Problem("add", "What is 12 + 7?", "", "19", (12, 7))
    assert is_right(problem, "19")
    assert is_right(problem, "\n\n19\n")
    assert is_right(problem, "<think>\n12 + 7\n</think>\n\n19")
    assert not is_right(problem, "119")
    assert not is_right(problem, "<think>\n19")
    assert not is_right(problem, "")


def test_the_generator_needs_no_torch() -> None:
    code = "import sys, ridgewalk.zoo.problems, ridgewalk.zoo.random_checkpoint; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
