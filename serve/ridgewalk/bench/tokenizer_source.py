"""The tokenizer that says how long a prompt is."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ridgewalk.config import ConfigError
from ridgewalk.zoo import list_zoo, zoo_path


def load_tokenizer(named: str | None, model: str) -> Tokenizer:
    """The tokenizer ``named`` by the user, or that of ``model``: a zoo name, a folder, a file or a hub id.

    Raises:
        ConfigError: there is none, or it cannot be read; says what to name.
    """
    source = named or model
    path = _local(source)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path is not None else _from_hub(source)
    except Exception as error:  # the binding raises plain Exception, the hub client many kinds
        reason = " ".join(str(error).split())[:200]
        blamed = f"{source!r} could not be read ({reason})" if named else f"none is known for the model {model!r}"
        raise ConfigError(
            f"--tokenizer: {blamed}; name a folder with the model's tokenizer.json, a zoo model "
            f"({', '.join(list_zoo())}) or a hub id"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _local(source: str) -> Path | None:
    if source in list_zoo():
        return zoo_path(source) / "tokenizer.json"
    path = Path(source).expanduser()
    if path.is_dir():
        return path / "tokenizer.json"
    return path if path.is_file() else None


def _from_hub(source: str) -> Tokenizer:
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError("neither a folder nor a hub id (owner/name)")
    from huggingface_hub import hf_hub_download

    return Tokenizer.from_file(hf_hub_download(source, "tokenizer.json"))
