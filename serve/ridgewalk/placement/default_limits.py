"""How much an engine takes into one step where nobody states it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from ridgewalk.placement.hardware import Device


class EngineLimits(NamedTuple):
    """Of each attention group."""

    max_num_seqs: int
    max_num_batched_tokens: int


DEFAULT_LIMITS: Mapping[Device, EngineLimits] = MappingProxyType(
    {"cuda": EngineLimits(1024, 8192), "cpu": EngineLimits(256, 2048)}
)
"""What nobody stated. On GPUs as in vLLM v1 on those of 70 GiB and more: pooled KV holds far more than 256 sequences,
and predictive admission keeps them within it. On CPUs each seat's logits must fit in small budgets; on a small GPU
they may have to be lowered."""
