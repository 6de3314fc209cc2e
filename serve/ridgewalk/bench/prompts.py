"""Prompts of so many tokens that share no prefix, so that no prefix cache answers for them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import Tokenizer

_TEXT = """
a able about add all also and answer any are as ask at away back be because before big both but by call can case come
count day did do does down each end even every fact far few find first for from gave get give go good great had half
hand has have he her here high him his home hour how if in into is it its just keep kind know large last left less let
line list long look made make many may mean men might more most much must name near need never new next no not now
number of off old on once one only or other our out over own part place plus point put question read right room said
same saw say see set she should show side small so some start state still such sum take tell ten than that the their
them then there they thing think this those three time to told too took turn two under up us use very want was way we
well went were what when where which while who why will with word work world would write year you your
"""
WORDS = tuple(_TEXT.split())
"""Common words, so that most tokenizers know each of them as one or few tokens."""


def write_prompts(tokenizer: Tokenizer, lengths: Sequence[int], seed: int) -> list[str]:
    """One text for each length, of exactly so many tokens where the tokenizer allows it; the same for the same seed."""
    # The length is in the seed too: else the prompts of two profiles would begin alike, and hit each other's cache.
    return [
        _write(tokenizer, length, random.Random(f"{seed}:{index}:{length}")) for index, length in enumerate(lengths)
    ]


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of a text, special ones not added."""
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _write(tokenizer: Tokenizer, length: int, rng: random.Random) -> str:
    # No word of a text encodes into nothing, so so many words have at least so many tokens; then the text is cut where
    # the tokens end. A cut inside a word can change how its beginning is divided: cut again until the count is right.
    text = " ".join(rng.choice(WORDS) for _ in range(length))
    for _ in range(8):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= length:
            break
        text = text[: encoding.offsets[length - 1][1]]
    missing = length - count_tokens(tokenizer, text)
    for _ in range(max(0, missing)):
        text += " " + rng.choice("abcdefghijklmnopqrstuvwxyz")
    return text
