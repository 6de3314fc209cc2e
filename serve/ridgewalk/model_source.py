"""Where a model's files are: the zoo, a local folder, or the hub (only when the user names a hub id)."""

from __future__ import annotations

from pathlib import Path

from ridgewalk.config import ConfigError
from ridgewalk.zoo import list_zoo, zoo_path

HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def find_model(model: str) -> Path:
    """The folder of ``model``, downloaded first if it is a hub id.

    Raises:
        ConfigError: there is no such model; says what was tried.
    """
    if model in list_zoo():
        return zoo_path(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model: the folder {folder} has no config.json; it is not a Hugging Face checkpoint")
        return folder.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        zoo = ", ".join(list_zoo())
        raise ConfigError(
            f"model: {model!r} is neither a model of the zoo ({zoo}), a folder, nor a hub id (owner/name)"
        )
    return _download(model)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"model: {hub_id!r} could not be read from the hub: {reason}") from None
