"""Fields of a Hugging Face ``config.json``, checked as they are read. Their errors are sentences for users."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def whole(config: Mapping[str, Any], field: str) -> int:
    """A positive whole number that must be there.

    Raises:
        ValueError: it is missing or something else.
    """
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {field} must be a positive whole number, got {value!r}")
    return value


def natural(config: Mapping[str, Any], field: str, default: int) -> int:
    """A whole number from 0 on; ``null`` means 0, and a field that is missing ``default``.

    Raises:
        ValueError: it is something else.
    """
    value = config.get(field, default)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"config.json: {field} must be a whole number from 0 on, got {value!r}")
    return value


def real(config: Mapping[str, Any], field: str, default: float) -> float:
    """A number from 0 on; ``null`` means ``default``, as does a field that is missing.

    Raises:
        ValueError: it is something else.
    """
    value = config.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"config.json: {field} must be a number from 0 on, got {value!r}")
    return float(value)


def token_ids(value: Any) -> tuple[int, ...]:
    """Token ids of a field that holds none, one or a list of them."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks that share a scale, when the checkpoint's weights are FP8 in blocks.

    Raises:
        ValueError: the checkpoint is quantized in another way.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3" or not block or len(block) != 2:
        raise ValueError(
            f"checkpoints quantized with {method!r} are not supported (only 'fp8' e4m3 with weight_block_size is); "
            "use an unquantized one"
        )
    return int(block[0]), int(block[1])


def fp8_complete(config: Mapping[str, Any]) -> bool:
    """False when an FP8 checkpoint names modules to leave as they are, other than those that never are FP8."""
    quantization = config.get("quantization_config") or {}
    left_out = quantization.get("modules_to_not_convert") or ()
    return all(name.endswith(("norm", "lm_head", "embed_tokens", ".gate")) for name in left_out)
