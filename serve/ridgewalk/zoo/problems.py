"""Generated problems with worked chains of thought: what `demo-dense` is trained and judged on.

Pure: only the standard library. A hash of the operands decides whether a problem belongs to the training or to the
test split, whatever its wording, so a test problem is fresh by construction: its operands never stood in a training
question.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ridgewalk.zoo.stories import long_story, short_story
from ridgewalk.zoo.working import (
    add_lines,
    borrow_lines,
    multiply_lines,
    plan_lines,
    step_line,
    subtract_lines,
)

Split = Literal["train", "test"]
THINK_END = "</think>"

# Shares of the kinds in the stream. The last two are long: they make the tail of the output length.
KINDS: dict[str, float] = {"add": 0.24, "sub": 0.26, "mul": 0.18, "story": 0.27, "sum": 0.03, "long_story": 0.02}

TEST_SHARE = 8  # one in so many operand tuples is a test problem

EXPRESSIONS = (
    "What is {}?",
    "Compute {}.",
    "Calculate {}.",
    "{} = ?",
    "{}=",
    "{}",
    "How much is {}?",
    "Please compute {}.",
    "Solve {}",
    "what is {}",
)
ADDITIONS = (
    "Please add {} and {}.",
    "Add {} and {}.",
    "What is {} plus {}?",
    "What is the sum of {} and {}?",
    "{} plus {}",
)
SUBTRACTIONS = (
    "What is {0} minus {1}?",
    "Subtract {1} from {0}.",
    "{0} minus {1}",
    "Please subtract {1} from {0}.",
    "Take {1} away from {0}.",
)
PRODUCTS = (
    "What is {} times {}?",
    "Multiply {} by {}.",
    "{} times {}",
    "What is the product of {} and {}?",
    "Please multiply {} by {}.",
)
LISTS = ("Add {}.", "What is the sum of {}?", "Find the sum of {}.", "Please add {}.")


@dataclass(frozen=True)
class Problem:
    """A question, the lines that work it out, and its answer in decimal."""

    kind: str
    question: str
    reasoning: str
    answer: str
    operands: tuple[int, ...]

    @property
    def output(self) -> str:
        """What the assistant should write, without the end-of-turn token."""
        return f"<think>\n{self.reasoning}\n{THINK_END}\n\n{self.answer}"


def split_of(kind: str, operands: tuple[int, ...]) -> Split:
    """The split a problem belongs to; the same on every machine and in every run."""
    digest = hashlib.blake2b(f"{kind}:{operands}".encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "little") % TEST_SHARE == 0 else "train"


def is_right(problem: Problem, content: str) -> bool:
    """Whether `content` (the text after `</think>`, or a whole output) is exactly the answer."""
    return content.rpartition(THINK_END)[2].strip() == problem.answer


def generate(rng: random.Random, split: Split, kind: str | None = None) -> Problem:
    """One problem of `split`, of the given kind or of one drawn by `KINDS`."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    while True:
        problem = _MAKERS[kind](rng)
        if split_of(problem.kind, problem.operands) == split:
            return problem


def stream(seed: int, split: Split = "train") -> Iterator[Problem]:
    """Endless problems of one split."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        yield generate(rng, split)


def sample_problems(n: int, seed: int = 0, split: Split = "test") -> list[Problem]:
    """`n` distinct problems; also a load for benchmarks, with the spread of lengths that reasoning has."""
    seen: dict[str, Problem] = {}
    for problem in stream(seed, split):
        seen.setdefault(problem.question, problem)
        if len(seen) >= n:
            break
    return list(seen.values())[:n]


def easy_problem(rng: random.Random, split: Split) -> Problem:
    """A sum or difference small enough to answer without thinking (`enable_thinking=false`)."""
    while True:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        if rng.random() < 0.5:
            kind, problem = "add", Problem("easy", _ask_add(rng, a, b), "", str(a + b), (a, b))
        else:
            a, b = max(a, b), min(a, b)
            kind, problem = "sub", Problem("easy", _ask_subtract(rng, a, b), "", str(a - b), (a, b))
        if split_of(kind, problem.operands) == split:  # as the same question is split with thinking on
            return problem


def easy_problems(n: int, seed: int = 0, split: Split = "test") -> list[Problem]:
    """`n` easy problems, to ask with thinking off; with so few operands some come twice."""
    rng = random.Random(f"easy-{split}-{seed}")
    return [easy_problem(rng, split) for _ in range(n)]


def _operand(rng: random.Random, digits: int = 4) -> int:
    """Up to `digits` digits, longer ones more often."""
    length = rng.choices(range(1, digits + 1), range(1, digits + 1))[0]
    return rng.randrange(10**length)


def _ask_expression(rng: random.Random, expression: str) -> str:
    form = rng.choice(EXPRESSIONS)
    if rng.random() < 0.15:
        expression = expression.replace(" ", "")
    return form.format(expression)


def _ask_add(rng: random.Random, a: int, b: int) -> str:
    if rng.random() < 0.7:
        return _ask_expression(rng, f"{a} + {b}")
    return rng.choice(ADDITIONS).format(a, b)


def _ask_subtract(rng: random.Random, a: int, b: int) -> str:
    if rng.random() < 0.7:
        return _ask_expression(rng, f"{a} - {b}")
    return rng.choice(SUBTRACTIONS).format(a, b)


def _ask_multiply(rng: random.Random, a: int, b: int) -> str:
    if rng.random() < 0.7:
        return _ask_expression(rng, f"{a} {rng.choice('***x×')} {b}")
    return rng.choice(PRODUCTS).format(a, b)


def _add(rng: random.Random) -> Problem:
    a, b = _operand(rng), _operand(rng)
    return Problem("add", _ask_add(rng, a, b), "\n".join(add_lines(a, b)), str(a + b), (a, b))


def _subtract(rng: random.Random) -> Problem:
    a, b = _operand(rng), _operand(rng)
    if rng.random() < 0.25:  # close to each other: zeros in front of the difference, and long comparisons
        b = max(0, a + rng.randint(-1, 1) * rng.randrange(10 ** rng.randint(1, 2)))
        b = min(b, 9999)
    return _difference(rng, a, b)


def _difference(rng: random.Random, a: int, b: int) -> Problem:
    return Problem("sub", _ask_subtract(rng, a, b), "\n".join(subtract_lines(a, b)), str(a - b), (a, b))


def _multiply(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return Problem("mul", _ask_multiply(rng, a, b), "\n".join(multiply_lines(a, b)), str(a * b), (a, b))


def _sum(rng: random.Random) -> Problem:
    count = rng.randint(4, 8)
    return _total(rng, [rng.randrange(1, 10 ** rng.randint(1, 3)) for _ in range(count)])


def _total(rng: random.Random, numbers: list[int]) -> Problem:
    """The numbers, added one after the other; some forms take numbers away too."""
    form = rng.choice(("list", "plus", "mixed"))
    total, signed = numbers[0], [numbers[0]]
    events: list[str] = []
    work: list[list[str]] = []
    for number in numbers[1:]:
        minus = form == "mixed" and total >= number and rng.random() < 0.5
        events.append(f"{'minus' if minus else 'plus'} {number}")
        work.append(borrow_lines(total, number) if minus else add_lines(total, number))
        signed.append(-number if minus else number)
        total += signed[-1]
    lines = [f"Start: {numbers[0]}.", *plan_lines(events)]
    for step, (event, worked) in enumerate(zip(events, work, strict=True), start=1):
        lines += [step_line(step, len(events), event), *worked]
    if form == "list":
        listed = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
        question = rng.choice(LISTS).format(listed)
    else:
        expression = str(signed[0]) + "".join(f" {'-' if n < 0 else '+'} {abs(n)}" for n in signed[1:])
        question = _ask_expression(rng, expression)
    return Problem("sum", question, "\n".join(lines), str(total), tuple(signed))


def _story(rng: random.Random) -> Problem:
    question, lines, answer, operands = short_story(rng)
    return Problem("story", question, "\n".join(lines), str(answer), operands)


def _long_story(rng: random.Random) -> Problem:
    question, lines, answer, operands = long_story(rng)
    return Problem("long_story", question, "\n".join(lines), str(answer), operands)


_MAKERS = {
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "sum": _sum,
    "story": _story,
    "long_story": _long_story,
}
