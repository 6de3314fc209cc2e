"""Tokenizer and incremental detokenizer."""

from __future__ import annotations

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.api.detokenizer import IncrementalDetokenizer
from ridgewalk.api.tokenizer import Tokenizer
from tests.api import tokenizers_for_tests as kinds

BYTE_LEVEL = Tokenizer(kinds.byte_level())
BYTE_FALLBACK = Tokenizer(kinds.byte_fallback())
WORD_PIECE = Tokenizer(kinds.word_piece())
METASPACE = Tokenizer(kinds.metaspace())


def pieces(tokenizer: Tokenizer, token_ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


def token_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40)


def test_kinds_are_recognized() -> None:
    assert BYTE_LEVEL.is_bytewise
    assert BYTE_FALLBACK.is_bytewise
    assert BYTE_FALLBACK.strips_first_space
    assert not WORD_PIECE.is_bytewise
    assert not METASPACE.is_bytewise


@given(token_ids(BYTE_LEVEL), st.booleans())
def test_byte_level_pieces_are_the_full_text(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids, skip)) == BYTE_LEVEL.decode(ids, skip)


@given(st.text(max_size=30))
def test_byte_fallback_pieces_are_the_full_text(text: str) -> None:
    ids = BYTE_FALLBACK.encode(text)
    assert "".join(pieces(BYTE_FALLBACK, ids)) == BYTE_FALLBACK.decode(ids)


@given(token_ids(BYTE_FALLBACK))
def test_byte_fallback_of_any_tokens_is_their_bytes(ids: list[int]) -> None:
    raw = b"".join(BYTE_FALLBACK.token_bytes(i) for i in ids if i not in BYTE_FALLBACK.special_ids)
    assert "".join(pieces(BYTE_FALLBACK, ids)) == raw.decode(errors="replace").removeprefix(" ")


@given(token_ids(WORD_PIECE))
def test_word_piece_pieces_are_the_full_text(ids: list[int]) -> None:
    # "don ' t" becomes "don't" only once the last of them is seen: what is out cannot be taken back
    ids = [i for i in ids if WORD_PIECE.token_text(i) != "'"]
    assert "".join(pieces(WORD_PIECE, ids)) == WORD_PIECE.decode(ids)


@given(token_ids(METASPACE))
def test_metaspace_pieces_are_the_full_text(ids: list[int]) -> None:
    assert "".join(pieces(METASPACE, ids)) == METASPACE.decode(ids)


@given(token_ids(METASPACE), token_ids(METASPACE), st.sampled_from([METASPACE, BYTE_FALLBACK]))
def test_text_that_continues_another(before: list[int], ids: list[int], tokenizer: Tokenizer) -> None:
    if tokenizer is BYTE_FALLBACK:
        (before, ids) = ([i + 259 for i in part] for part in (before, ids))  # no bytes, no special tokens
    detokenizer = IncrementalDetokenizer(tokenizer, context=before)
    text = "".join([*map(detokenizer.push, ids), detokenizer.flush()])
    assert tokenizer.decode(before) + text == tokenizer.decode(before + ids)


@given(st.text(max_size=30), st.sampled_from([BYTE_LEVEL, BYTE_FALLBACK]))
def test_no_piece_has_half_a_character(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)).count("\ufffd") == text.count("\ufffd")


def test_broken_character_at_the_end_is_flushed() -> None:
    ids = BYTE_LEVEL.encode("a𝄞")
    half = ids[:-1]
    assert BYTE_LEVEL.decode(half).startswith("a\ufffd")
    assert pieces(BYTE_LEVEL, half)[-1] == "\ufffd"


def test_kept_special_tokens_show() -> None:
    tokenizer = Tokenizer(kinds.byte_level(tags_are_special=True))
    tag = tokenizer.token_id("<think>")
    assert tag in tokenizer.special_ids
    assert IncrementalDetokenizer(tokenizer).push(tag) == ""
    assert IncrementalDetokenizer(tokenizer, keep_ids={tag}).push(tag) == "<think>"


@given(st.text(max_size=40))
def test_token_bytes_join_to_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    assert b"".join(map(BYTE_LEVEL.token_bytes, ids)) == text.encode()


def test_added_token_outside_the_byte_alphabet() -> None:
    user = BYTE_LEVEL.token_id("<｜User｜>")
    assert BYTE_LEVEL.token_text(user) == "<｜User｜>"
    assert BYTE_LEVEL.token_text(BYTE_LEVEL.vocab_size + 5) == ""


def test_bos_comes_from_the_post_processor() -> None:
    assert BYTE_FALLBACK.encode("a")[0] == 1
    assert BYTE_FALLBACK.encode("a", add_special_tokens=False)[0] != 1


def test_truncation_and_padding_of_the_file_are_switched_off() -> None:
    inner = kinds.byte_level()
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(inner.to_str()))
    assert len(tokenizer.encode("one two three four five six")) not in (3, 50)
