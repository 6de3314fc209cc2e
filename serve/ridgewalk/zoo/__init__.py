"""The small demo models that ship with the package, and the script that trains them. Importing this needs no torch."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

_HERE = Path(__file__).parent

#: Shipped models: name -> what it is.
ZOO = MappingProxyType(
    {
        "demo-dense": "Qwen3, 3.3 M parameters: reasons through sums, differences, products and word problems",
        "demo-moe": "DeepSeek-V3, 4.3 M parameters, 8 experts: the same problems",
    }
)


def list_zoo() -> list[str]:
    """Names of the shipped models, in order."""
    return sorted(ZOO)


def zoo_path(name: str) -> Path:
    """Folder of a shipped model, in Hugging Face layout. Raises KeyError, naming the models there are."""
    if name not in ZOO:
        raise KeyError(f"no model {name!r} in the zoo; there are: {', '.join(list_zoo())}")
    return _HERE / name
