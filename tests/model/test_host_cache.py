"""KV of blocks on its way to the host and back."""

from __future__ import annotations

import torch
from psutil import Process

from ridgewalk.engine.step import BlockCopy
from ridgewalk.model.host_cache import AT_ONCE, HostCache
from ridgewalk.model.kv_cache import LatentCache, LayerCache


def test_copies_are_made_in_their_order_of_all_that_belongs_to_a_block() -> None:
    shape = (6, 4, 2, 8)
    layers = [LayerCache(torch.randn(shape), torch.randn(shape)), LatentCache(torch.randn(6, 4, 10))]
    before = [tensor.clone() for layer in layers for tensor in layer.tensors]
    swap = HostCache(layers, 2)
    assert sum(host.nbytes for _, host in swap._pairs) == sum(tensor[:2].nbytes for tensor in before)
    out, back = True, False
    swap.copy([BlockCopy(out, 3, 1), BlockCopy(out, 4, 0), BlockCopy(back, 5, 1), BlockCopy(out, 2, 1)])
    for layer in layers:
        for tensor in layer.tensors:
            tensor[3] = 0.0  # others compute there
    swap.copy([BlockCopy(back, 0, 0), BlockCopy(back, 1, 1)])
    after = [tensor for layer in layers for tensor in layer.tensors]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[[0, 1, 5]], old[[4, 2, 3]])
        assert torch.equal(new[[2, 4]], old[[2, 4]])


def test_memory_is_taken_only_as_blocks_are_written() -> None:
    num_blocks, megabyte = 1000, 2**20
    layer = LatentCache(torch.zeros(2, 64, 4096))  # a megabyte each
    before = Process().memory_info().rss
    swap = HostCache([layer], num_blocks)
    untouched = Process().memory_info().rss - before
    swap.copy([BlockCopy(True, 0, block) for block in range(100)])
    written = Process().memory_info().rss - before
    assert untouched < 50 * megabyte < 100 * megabyte <= written < 300 * megabyte


def test_of_copies_to_one_place_the_last_stands_however_many_there_are() -> None:
    num_blocks = 3 * AT_ONCE
    layer = LatentCache(torch.randn(num_blocks, 16, 64))
    swap = HostCache([layer], num_blocks)
    to_first = [BlockCopy(True, block, 0) for block in range(num_blocks)]
    others = [BlockCopy(True, block, block) for block in range(1, num_blocks)]
    swap.copy([*to_first, *others])
    before = layer.latent.clone()
    swap.copy([BlockCopy(False, 0, 0)])
    assert torch.equal(layer.latent[0], before[num_blocks - 1])
    swap.copy([BlockCopy(False, num_blocks - block, block) for block in range(1, num_blocks)])
    assert torch.equal(layer.latent[1:].flip(0), before[1:])
