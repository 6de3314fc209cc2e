"""Reading a paged cache in torch's operations."""

from __future__ import annotations

import torch


def pages(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first ``length`` tokens of one sequence: ``[length, ...]`` of a cache ``[num_blocks, block_size, ...]``."""
    block_size = cache.shape[1]
    return cache[table[: -(-length // block_size)].long()].flatten(0, 1)[:length]
