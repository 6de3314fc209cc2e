"""A rank's part of the swap space: its KV of the blocks that the scheduler keeps on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from ridgewalk.engine.step import BlockCopy
from ridgewalk.model.kv_cache import LatentCache, LayerCache

AT_ONCE = 64
"""Blocks of a layer that are gathered for one transfer: what that takes beside the caches."""


class HostCache:
    """Memory on the host for so many blocks of all layers of a stage.

    Pageable memory, which is taken as blocks are written: a step waits for its copies.
    """

    def __init__(self, caches: Sequence[LayerCache | LatentCache], num_blocks: int) -> None:
        self._pairs = [
            (tensor, torch.empty((num_blocks, *tensor.shape[1:]), dtype=tensor.dtype))
            for cache in caches
            for tensor in cache.tensors
        ]

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Make copies in their order: one may read what another before it wrote."""
        for to_host, blocks, host_blocks in _batches(copies):
            for tensor, host in self._pairs:
                if to_host:
                    host[host_blocks] = tensor[blocks].to(host.device)
                else:
                    tensor[blocks] = host[host_blocks].to(tensor.device)


def _batches(copies: Sequence[BlockCopy]) -> Iterator[tuple[bool, list[int], list[int]]]:
    """Copies that can be made together: in one direction, and none to where another goes."""
    for to_host, run in groupby(copies, key=lambda copy: copy.to_host):
        # A host block that was given up and taken again within the run: what came first is lost.
        same = list({(copy.host_block if to_host else copy.block): copy for copy in run}.values())
        for begin in range(0, len(same), AT_ONCE):
            some = same[begin : begin + AT_ONCE]
            yield to_host, [copy.block for copy in some], [copy.host_block for copy in some]
