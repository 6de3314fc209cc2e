"""Token ids to text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from ridgewalk.api.tokenizer import Tokenizer

_MAX_WINDOW = 32  # tokens that may wait for the rest of a character; no character takes as many
_CONTEXT = 6  # tokens before, which say how the first ones are to be joined to them


class IncrementalDetokenizer:
    """Text of one sequence, token by token, in constant time each; never half a character.

    The pieces and `flush` together are `Tokenizer.decode` of all the ids. One exception: where a model breaks off a
    character that it spells in byte-fallback tokens, `decode` spoils the whole run of bytes, which cannot be known
    before the run ends; here only the broken character becomes U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        keep_ids: Collection[int] = frozenset(),
        context: Sequence[int] = (),
    ) -> None:
        """``keep_ids``: special tokens whose text is wanted even so (the tags around reasoning).

        ``context``: the tokens before, if the text continues theirs: tokenizers that drop the first space of a text
        then keep it.
        """
        skipped = tokenizer.special_ids.difference(keep_ids) if skip_special_tokens else frozenset()
        before = [token_id for token_id in context[-_CONTEXT:] if token_id not in skipped]
        self._text = (_Bytewise if tokenizer.is_bytewise else _Windowed)(tokenizer, skipped, before)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        return self._text.push(token_id)

    def flush(self) -> str:
        """The end of the text: U+FFFD in place of an incomplete character."""
        return self._text.flush()


class _Bytewise:
    """For tokenizers that decode by joining the bytes of tokens."""

    def __init__(self, tokenizer: Tokenizer, skipped: Collection[int], before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_first_space and not before

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windowed:
    """For any other decoder: decode a window of tokens twice, with and without the new ones, and take the difference.

    A token's text may depend on those before it (spaces), so the window begins with tokens whose text is already out.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Collection[int], before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window = before
        self._emitted_ids = len(before)  # tokens at the head of the window whose text is out
        self._emitted_text = tokenizer.decode(before, skip_special_tokens=False)  # the text of those

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        waiting = len(self._window) - self._emitted_ids
        if waiting < _MAX_WINDOW and (text.endswith("\ufffd") or len(text) <= len(self._emitted_text)):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._tokenizer.decode(self._window, skip_special_tokens=False))

    def _advance(self, text: str) -> str:
        new = text[len(self._emitted_text) :]
        self._window = self._window[self._emitted_ids :] or self._window
        self._emitted_ids = len(self._window)
        self._emitted_text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        return new
