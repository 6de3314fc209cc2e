"""Sentences about the configuration, for who wrote flags and no file."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PLACE = re.compile(r"\bmodels\[0\](?:\.placements\[0\])?(?:: |\.)")  # flags describe one placement of one model
_KEY = re.compile(r"\bapi_keys\[\d+\]")


def in_flags(sentence: str, flags: Mapping[str, str]) -> str:
    """``models[0].placements[0].memory: ...`` as ``--memory: ...``, and other fields likewise.

    A field's name within a path of the file system stays. ``flags``: what to write instead of each field's name; if
    ``model`` is not among them, a file says what the models are, and keeps its paths.
    """
    sentence = _KEY.sub("api_keys", sentence)
    if "model" in flags:
        sentence = _PLACE.sub("", sentence)
    for field, flag in flags.items():
        word = rf"(?<![\w./-]){field}(?![\w/-]|\.\w)"
        if "_" not in field:  # may be a word of English, except where a problem begins with it
            word = rf"(?:^|(?<=[.;:] )){field}(?=: | and )"
        sentence = re.sub(word, flag, sentence)
    return sentence
