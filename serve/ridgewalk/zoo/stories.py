"""Word problems: people, things, and one to many steps, each with its reasoning."""

from __future__ import annotations

import random
from collections.abc import Callable

from ridgewalk.zoo.working import add_lines, borrow_lines, multiply_lines, plan_lines, step_line

# fmt: off
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo",
    "Ines", "Jack", "Lena", "Mia", "Noah", "Olga", "Paul", "Tom",
)
THINGS = (
    "apples", "books", "marbles", "stamps", "coins", "pencils",
    "stickers", "cards", "shells", "eggs", "cookies", "beads",
)
# fmt: on
BOXES = ("boxes", "bags", "packs", "baskets")
GAINS = ("buys", "finds", "gets", "picks up")
LOSSES = ("gives away", "loses", "sells", "uses")

# (text of the question, lines of reasoning, answer, operands): the operands decide the split.
Story = tuple[str, list[str], int, tuple[int, ...]]


def _number(rng: random.Random, digits: int = 3) -> int:
    """A number with 1 to `digits` digits, each length about as likely; at least 2 so that plurals read well."""
    return max(2, rng.randrange(10 ** rng.randint(1, digits)))


def _diary(rng: random.Random, steps: int) -> Story:
    """Someone's things, with `steps` gains, losses and purchases of boxes."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start = total = _number(rng)
    events: list[tuple[str, list[str]]] = []
    operands = [total]
    text = [f"{name} has {total} {thing}."]
    for step in range(1, steps + 1):
        event, lines, change, numbers = _event(rng, total)
        events.append((event, lines))
        operands += numbers
        total += change
        text.append(f"{'Then ' if step > 1 else ''}{name} {event} {thing}.")
    text.append(f"How many {thing} does {name} have now?")
    lines = [f"Start: {start}.", *plan_lines([event for event, _ in events])]
    for step, (event, work) in enumerate(events, start=1):
        lines += [step_line(step, steps, event), *work]
    return " ".join(text), lines, total, tuple(operands)


def _event(rng: random.Random, total: int) -> tuple[str, list[str], int, list[int]]:
    """What happens to someone with `total` things: its words, its working, the change, and its operands."""
    choice = rng.random()
    if choice < 0.2 and total < 5000:
        count, each = rng.randint(2, 9), rng.randint(2, 99)
        lines = [*multiply_lines(each, count), *add_lines(total, count * each)]
        return f"buys {count} {rng.choice(BOXES)} of {each}", lines, count * each, [count, each]
    if choice < 0.6 or total < 2:
        more = _number(rng)
        return f"{rng.choice(GAINS)} {more}", add_lines(total, more), more, [more]
    less = rng.randint(1, min(total, 10 ** rng.randint(1, 3)))
    return f"{rng.choice(LOSSES)} {less}", borrow_lines(total, less), -less, [-less]


def _together(rng: random.Random) -> Story:
    """One person has some more or fewer than another; how many together?"""
    one, two = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    base = _number(rng)
    if rng.random() < 0.5:
        gap = _number(rng)
        word, first, other = "more", add_lines(base, gap), base + gap
    else:
        gap = rng.randint(1, base)
        word, first, other = "fewer", borrow_lines(base, gap), base - gap
    text = f"{one} has {base} {thing}. {two} has {gap} {word} than {one}. How many {thing} do they have together?"
    lines = [step_line(1, 2, f"{two} has {gap} {word}"), *first, step_line(2, 2, "together"), *add_lines(base, other)]
    return text, lines, base + other, (base, gap, 1 if word == "more" else 2)


def _shop(rng: random.Random) -> Story:
    """Buying several things at one price, sometimes with change."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    price, count = rng.randint(2, 99), rng.randint(2, 9)
    cost = price * count
    text = f"{name} buys {count} {thing} at {price} dollars each."
    if rng.random() < 0.5:
        lines = [step_line(1, 1, "the cost"), *multiply_lines(price, count)]
        return f"{text} How much does {name} pay?", lines, cost, (price, count)
    paid = cost + rng.randrange(10 ** rng.randint(1, 3))
    text += f" {name} pays with {paid} dollars. How much change does {name} get?"
    lines = [step_line(1, 2, "the cost"), *multiply_lines(price, count)]
    lines += [step_line(2, 2, "the change"), *borrow_lines(paid, cost)]
    return text, lines, paid - cost, (price, count, paid)


def _groups(rng: random.Random) -> Story:
    """Equal groups and some left over."""
    thing, box = rng.choice(THINGS), rng.choice(BOXES)
    count, each, extra = rng.randint(2, 9), rng.randint(2, 399), _number(rng, 2)
    text = f"There are {count} {box} with {each} {thing} each, and {extra} more {thing}."
    text += f" How many {thing} are there in total?"
    lines = [step_line(1, 2, f"{count} {box} of {each}"), *multiply_lines(each, count)]
    lines += [step_line(2, 2, f"{extra} more"), *add_lines(count * each, extra)]
    return text, lines, count * each + extra, (count, each, extra)


_SHORT: tuple[Callable[[random.Random], Story], ...] = (_together, _shop, _groups)


def short_story(rng: random.Random) -> Story:
    """A word problem of one to three steps."""
    if rng.random() < 0.5:
        return rng.choice(_SHORT)(rng)
    return _diary(rng, rng.choice((1, 1, 2, 2, 3)))


def long_story(rng: random.Random) -> Story:
    """A word problem of four to seven steps: the tail of the length distribution."""
    return _diary(rng, rng.randint(4, 7))
