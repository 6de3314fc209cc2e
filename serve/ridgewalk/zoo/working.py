"""Column arithmetic written out as a chain of thought.

Each line is a small local function of what stands above it: one digit of each operand, the carry of the previous
line, and the result so far, which is copied with one more digit in front. A model of a few million parameters learns
such lines; it does not learn to add four digits at once.
"""

from __future__ import annotations

PLACES = ("units", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands")


def _digits(n: int) -> list[int]:
    """Decimal digits of `n`, units first."""
    return [int(c) for c in reversed(str(n))]


def _at(digits: list[int], i: int) -> int:
    return digits[i] if i < len(digits) else 0


def plan_lines(events: list[str]) -> list[str]:
    """One line that numbers what is to be done. A step then looks its event up by its number."""
    return [f"Plan: {', '.join(f'{i}: {event}' for i, event in enumerate(events, start=1))}."]


def step_line(step: int, steps: int, event: str) -> str:
    """The head of one step of a plan; the countdown tells when to stop."""
    return f"Step {step}: {event} ({steps - step} left)."


def add_lines(a: int, b: int) -> list[str]:
    """Lines that work out `a + b` (both >= 0); the last one is `a + b = sum`."""
    da, db = _digits(a), _digits(b)
    lines, carry, so_far = [f"{a} + {b}"], 0, ""
    width = max(len(da), len(db))
    for i in range(width):
        x, y = _at(da, i), _at(db, i)
        total = x + y + carry
        terms = f"{x} + {y}" if i == 0 else f"{x} + {y} + {carry}"
        carry, so_far = total // 10, f"{total % 10}{so_far}"
        lines.append(f"{PLACES[i]}: {terms} = {total}, carry {carry} -> {so_far}")
    if carry:
        lines.append(f"{PLACES[width]}: carry {carry} -> {carry}{so_far}")
    lines.append(f"{a} + {b} = {a + b}")
    return lines


def compare_lines(a: int, b: int) -> list[str]:
    """One line that compares from the highest place down to the first difference."""
    da, db = _digits(a), _digits(b)
    parts = []
    for i in reversed(range(max(len(da), len(db)))):
        x, y = _at(da, i), _at(db, i)
        parts.append(f"{PLACES[i]} {x} and {y} {'>' if x > y else '<' if x < y else '='}")
        if x != y:
            break
    sign = ">" if a > b else "<" if a < b else "="
    return [f"compare: {', '.join(parts)}, so {a} {sign} {b}"]


def borrow_lines(a: int, b: int) -> list[str]:
    """Lines that work out `a - b` for `a >= b >= 0`; the last one is `a - b = difference`."""
    da, db = _digits(a), _digits(b)
    lines, borrow, so_far = [f"{a} - {b}"], 0, ""
    for i in range(len(da)):
        x, y = da[i], _at(db, i)
        difference = x - y - borrow
        terms = f"{x} - {y}" if i == 0 else f"{x} - {y} - {borrow}"
        borrow, so_far = int(difference < 0), f"{difference % 10}{so_far}"
        lines.append(f"{PLACES[i]}: {terms} = {difference}, borrow {borrow} -> {so_far}")
    lines.append(f"{a} - {b} = {a - b}")
    return lines


def subtract_lines(a: int, b: int) -> list[str]:
    """Lines that work out `a - b` of either sign: compare, then subtract the smaller from the larger."""
    lines = compare_lines(a, b)
    if a >= b:
        return lines + borrow_lines(a, b)
    return lines + borrow_lines(b, a) + [f"{a} - {b} = -{b - a}"]


def times_digit_lines(a: int, digit: int) -> list[str]:
    """Lines that work out `a * digit` for one digit; the last one is `a * digit = product`."""
    da = _digits(a)
    lines, carry, so_far = [f"{a} * {digit}"], 0, ""
    for i, x in enumerate(da):
        product = x * digit
        total = product + carry
        terms = f"{x} * {digit} = {product}"
        if i:
            terms += f", {product} + {carry} = {total}"
        carry, so_far = total // 10, f"{total % 10}{so_far}"
        lines.append(f"{PLACES[i]}: {terms}, carry {carry} -> {so_far}")
    if carry:
        lines.append(f"{PLACES[len(da)]}: carry {carry} -> {carry}{so_far}")
    lines.append(f"{a} * {digit} = {a * digit}")
    return lines


def multiply_lines(a: int, b: int) -> list[str]:
    """Lines that work out `a * b`, `b` of one or two digits: partial products, then their sum."""
    if b < 10:
        return times_digit_lines(a, b)
    tens, units = divmod(b, 10)
    low, high = a * units, a * tens * 10
    lines = [f"{a} * {b} = {a} * {units} + {a} * {tens}0"]
    lines += times_digit_lines(a, units)
    lines += times_digit_lines(a, tens)
    lines += [f"{a} * {tens}0 = {high}"]
    lines += add_lines(low, high)
    return [*lines, f"{a} * {b} = {a * b}"]
