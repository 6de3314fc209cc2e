"""Parting reasoning from content, however the text is cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ridgewalk.api.reasoning import ReasoningCounter, ReasoningSplitter

OPEN_PROMPT = "<|im_start|>assistant\n<think>\n"
CLOSED_PROMPT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def part(pieces: list[str], prompt: str = "") -> tuple[str, str]:
    splitter = ReasoningSplitter(prompt)
    parts = [*map(splitter.push, pieces), splitter.flush()]
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts)


def expected(text: str, begins_inside: bool) -> tuple[str, str]:
    opened = re.match(r"\s*<think>", text)
    if not begins_inside and not opened:
        return "", text
    text = text[opened.end() if opened else 0 :]
    body, closed, content = text.partition("</think>")
    return body.lstrip("\n").rstrip("\n" if closed else ""), content.lstrip("\n") if closed else ""


@pytest.mark.parametrize(
    ("text", "prompt", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nYes.", "", "hm", "Yes."),
        ("hm\n</think>\n\nYes.", OPEN_PROMPT, "hm", "Yes."),
        ("hm", OPEN_PROMPT, "hm", ""),
        ("<think>\nhm\n</think>\n\nYes.", OPEN_PROMPT, "hm", "Yes."),
        ("<thi", OPEN_PROMPT, "<thi", ""),
        ("<think>\nhm", "", "hm", ""),
        ("Yes.", CLOSED_PROMPT, "", "Yes."),
        ("Write <think> and </think>.", "", "", "Write <think> and </think>."),
        ("<think>\n\n</think>\n\nYes.\n", "", "", "Yes.\n"),
        ("a < b </thin air", OPEN_PROMPT, "a < b </thin air", ""),
        ("<think>a</think>b <think>c</think>", "", "a", "b <think>c</think>"),
        ("\n\nYes", "", "", "\n\nYes"),
        (" <thi", "", "", " <thi"),
        ("", OPEN_PROMPT, "", ""),
    ],
)
def test_examples(text: str, prompt: str, reasoning: str, content: str) -> None:
    assert part([text], prompt) == (reasoning, content)
    assert part(list(text), prompt) == (reasoning, content)


PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "</th", "think>", "ink>", "\n", "a", " ", "é"]))


@given(PIECES, st.booleans())
@example(["<think>", "\n", "</th", "\n", "</think>", "\n", "a"], False)
def test_any_cut_gives_the_same_parts(pieces: list[str], begins_inside: bool) -> None:
    assert part(pieces, OPEN_PROMPT if begins_inside else "") == expected("".join(pieces), begins_inside)


@given(PIECES, st.booleans())
def test_what_is_held_back_could_be_a_tag_or_newlines_before_one(pieces: list[str], begins_inside: bool) -> None:
    splitter = ReasoningSplitter(OPEN_PROMPT if begins_inside else "")
    for piece in pieces:
        splitter.push(piece)
        held = splitter._held.strip("\n ")
        assert "<think>".startswith(held) or "</think>".startswith(held)


@given(PIECES, st.booleans())
def test_tokens_between_the_tags_are_counted(pieces: list[str], begins_inside: bool) -> None:
    splitter = ReasoningSplitter(OPEN_PROMPT if begins_inside else "")
    counter = ReasoningCounter(splitter, frozenset())
    starts, position = [], 0
    for piece in pieces:
        starts.append(position)
        counter.add(0, position)
        splitter.push(piece)
        counter.settle()
        position += len(piece)
    splitter.flush()
    counter.settle(final=True)
    text = "".join(pieces)
    tag = re.match(r"\s*<think>", text)
    opened = tag.end() if tag else 0 if begins_inside else len(text) + 1
    closed = text.find("</think>", opened)
    assert counter.count == sum(opened <= start < (closed if closed >= 0 else len(text) + 1) for start in starts)


def test_the_count_never_has_to_be_taken_back() -> None:
    splitter = ReasoningSplitter(OPEN_PROMPT)
    counter = ReasoningCounter(splitter, frozenset())
    counts, position = [], 0
    for piece in ["a", "\n", "</", "think", ">", "\n", "b"]:
        counter.add(0, position)
        position += len(piece)
        splitter.push(piece)
        counter.settle()
        counts.append(counter.count)
    assert counts == [1, 2, 2, 2, 2, 2, 2]
