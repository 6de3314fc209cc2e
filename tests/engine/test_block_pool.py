"""Allocation, sharing and eviction of blocks."""

from __future__ import annotations

import pytest

from ridgewalk.engine.block_pool import BlockPool, hash_block


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2, 3]


def test_cached_blocks_are_evicted_least_recently_released_first_and_tails_before_heads() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    assert old is not None
    assert new is not None
    hashes = [hash_block(b"", [i]) for i in range(4)]
    for block, block_hash in zip(old + new, hashes, strict=True):
        pool.publish(block, block_hash)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.find(hashes[1]) is None
    assert pool.find(hashes[0]) == old[0]
    pool.check_integrity()


def test_awaited_blocks_are_evicted_last_until_nobody_awaits_them() -> None:
    pool = BlockPool(3)
    for content in range(3):
        (block,) = pool.allocate(1) or []
        pool.publish(block, hash_block(b"", [content]))
        pool.release([block], awaited={hash_block(b"", [number]) for number in range(2)})
    pool.check_integrity()
    first, second, last = (pool.find(hash_block(b"", [content])) for content in range(3))
    assert pool.allocate(1) == [last]
    assert second is not None
    pool.await_no_more(second)
    assert pool.allocate(2) == [second, first]
    pool.check_integrity()


def test_a_found_block_is_shared_until_its_last_holder_leaves() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], b"x")
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert (pool.num_used, pool.num_cached) == (0, 1)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(blocks)


def test_hashes_depend_on_everything_before() -> None:
    assert hash_block(hash_block(b"", [1]), [2]) != hash_block(hash_block(b"", [3]), [2])
