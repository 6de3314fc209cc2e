"""Reads what the API layer needs from a model's folder: plain files, no torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ridgewalk.api.backend import ServedModel
from ridgewalk.api.chat_template import ChatTemplate, ChatTemplateError
from ridgewalk.api.tokenizer import Tokenizer
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo

_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ModelFolderError(ValueError):
    """The folder cannot be served; the message is a sentence that names the file."""


def load_served_model(
    name: str,
    folder: Path | str,
    *,
    max_model_len: int | None = None,
    chat_template: str | None = None,
    default_sampling: dict[str, float] | None = None,
    created: int | None = None,
    slo: LatencySlo = NO_SLO,
) -> ServedModel:
    """Read the folder's tokenizer, its chat template, ``generation_config.json`` and ``config.json``.

    ``max_model_len``: None takes the model's own (``max_position_embeddings``). ``chat_template``: the source of one to
    use instead of the folder's. ``default_sampling``: overrides generation_config.json's. ``created``: unix seconds,
    now if None. ``slo``: of requests that ask for none. Raises `ModelFolderError`.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json", required=True)
    config = {**config, **config.get("text_config", {})}  # multimodal models keep the language model's part there
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    generation_config = _read_json(folder / "generation_config.json")
    try:
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"Model {name} needs a tokenizer.json in {folder}: {error}") from error
    special_tokens = _special_tokens(tokenizer_config)
    source = chat_template or _chat_template_source(folder, tokenizer_config)
    try:
        template = ChatTemplate(source, special_tokens) if source else None
    except ChatTemplateError as error:
        raise ModelFolderError(f"Model {name} in {folder}: {error}") from error
    limit = max_model_len or config.get("max_position_embeddings")
    if not isinstance(limit, int):
        raise ModelFolderError(f"{folder}/config.json has no max_position_embeddings: set max_model_len for {name}.")
    return ServedModel(
        name=name,
        tokenizer=tokenizer,
        chat_template=template,
        max_model_len=limit,
        vocab_size=config.get("vocab_size") or tokenizer.vocab_size,
        eos_token_ids=_eos_token_ids(config, generation_config, special_tokens, tokenizer),
        default_sampling=_default_sampling(generation_config) | (default_sampling or {}),
        created=int(time.time()) if created is None else created,
        slo=slo,
    )


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} must hold a JSON object.")
    return value


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """``bos_token`` and its like: a string, or an object with ``content``; the template does not see absent ones."""
    tokens = {}
    for key in _TOKEN_KEYS:
        token = tokenizer_config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[key] = token
    return tokens


def _chat_template_source(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The folder's own file goes before the entry in tokenizer_config.json, which may be a list of named templates."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named and len(named) > 1:
            raise ModelFolderError(f"{folder}: of the chat templates {', '.join(named)} none is named `default`.")
        return named.get("default") or next(iter(named.values()), None)
    return template


def _eos_token_ids(
    config: dict[str, Any], generation_config: dict[str, Any], special_tokens: dict[str, str], tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Every id that ends a sequence: generation_config.json's (else config.json's) and the tokenizer's own."""
    listed = generation_config.get("eos_token_id", config.get("eos_token_id"))
    ids = listed if isinstance(listed, list) else [listed]
    own = tokenizer.token_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return tuple(dict.fromkeys(i for i in (*ids, own) if i is not None))


def _default_sampling(generation_config: dict[str, Any]) -> dict[str, float]:
    """What the model's makers advise; their ``do_sample: false`` is ignored, as in vLLM."""
    return {key: generation_config[key] for key in _SAMPLING_KEYS if generation_config.get(key) is not None}
