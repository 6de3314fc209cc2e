"""A tokenizer read from ``tokenizer.json``: what the API layer needs of it, without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

SPIECE_SPACE = "\u2581"


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads at once."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Takes ``inner`` over: truncation and padding, which some tokenizer.json files carry, are switched off."""
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._pieces = _byte_pieces(inner)
        self.is_bytewise = self._pieces is not None  # decoding is the concatenation of `token_bytes`
        self.strips_first_space = self.is_bytewise and _strips_first_space(inner)

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Read a ``tokenizer.json``. Raises `OSError` or, for a broken file, `ValueError`."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the binding raises plain Exception
            raise ValueError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; ``add_special_tokens`` runs the post-processor of tokenizer.json (BOS and the like)."""
        return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; half a UTF-8 character becomes U+FFFD, an id without a token becomes nothing."""
        return self._inner.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of exactly this token, if the vocabulary has it."""
        return self._inner.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text (special tokens: their name); empty for an id without a token."""
        if self._pieces is not None:
            return self._pieces.get(token_id, b"")
        return self._inner.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """A token on its own as text, for log-probabilities; bytes that are no character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


def _byte_pieces(inner: tokenizers.Tokenizer) -> dict[int, bytes] | None:
    """The bytes of each token when decoding is no more than joining them (nearly every LLM's tokenizer), else None."""
    kinds = [step["type"] for step in _decoder_steps(inner)]
    vocab = inner.get_vocab(with_added_tokens=True)
    if kinds == ["ByteLevel"]:
        byte_of = {char: byte for byte, char in enumerate(_byte_level_alphabet())}
        return {i: _byte_level_bytes(token, byte_of) for token, i in vocab.items()}
    # Llama 2, Mistral, Gemma and others converted from sentencepiece
    if kinds in (["Replace", "ByteFallback", "Fuse", "Strip"], ["Replace", "ByteFallback", "Fuse"]):
        replace = _decoder_steps(inner)[0]
        if replace.get("pattern") != {"String": SPIECE_SPACE} or replace.get("content") != " ":
            return None
        if kinds[-1] == "Strip" and not _strips_first_space(inner):
            return None
        return {i: _byte_fallback_bytes(token) for token, i in vocab.items()}
    return None


def _decoder_steps(inner: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's own JSON, as a list of steps (its pickled state is that part of tokenizer.json)."""
    if inner.decoder is None:
        return [{"type": "None"}]
    decoder: dict[str, Any] = json.loads(inner.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _strips_first_space(inner: tokenizers.Tokenizer) -> bool:
    last = _decoder_steps(inner)[-1]
    return last["type"] == "Strip" and (last["content"], last["start"], last["stop"]) == (" ", 1, 0)


def _byte_level_alphabet() -> list[str]:
    """GPT-2's character for each byte: printable ones stand for themselves, the others for U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_level_bytes(token: str, byte_of: dict[str, int]) -> bytes:
    if all(char in byte_of for char in token):
        return bytes(byte_of[char] for char in token)
    return token.encode("utf-8")  # an added token, which is not spelt in that alphabet


def _byte_fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(SPIECE_SPACE, " ").encode("utf-8")
