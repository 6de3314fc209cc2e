"""Block tables of the requests of one attention group: growth, prefix hits, release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ridgewalk.engine.block_pool import BlockPool, hash_block
from ridgewalk.engine.request import Request
from ridgewalk.engine.swap_space import SwapSpace

ON_HOST = -1


@dataclass(frozen=True)
class PrefixHit:
    """The longest cached prefix of a request."""

    blocks: list[int]  # `ON_HOST`: to be copied back into a block that is yet to be allocated
    num_tokens: int
    num_unreferenced: int  # of `blocks`, those that nobody uses: acquiring them shrinks what is available
    num_on_host: int = 0

    @property
    def num_in_cache(self) -> int:
        """Blocks that need no room."""
        return len(self.blocks) - self.num_on_host

    @property
    def num_shared(self) -> int:
        """Blocks that others use already."""
        return self.num_in_cache - self.num_unreferenced


class KVCacheManager:
    """Maps a request's tokens to blocks of a `BlockPool`. Block tables only ever grow until they are released."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, num_swap_blocks: int = 0
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.pool = BlockPool(num_blocks)
        self.swap = SwapSpace(num_swap_blocks)
        if num_swap_blocks:
            self.pool.on_evicted = self.swap.on_evicted
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: Request) -> PrefixHit:
        """Longest run of full blocks from the start that is cached. At least one token is always left to compute."""
        blocks: list[int] = []
        if self.enable_prefix_caching:
            self._extend_hashes(request)
            for block_hash in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
                block = self.pool.find(block_hash)
                if block is None and not self.swap.holds(block_hash):
                    break
                blocks.append(ON_HOST if block is None else block)
        unreferenced = sum(block != ON_HOST and self.pool.is_unreferenced(block) for block in blocks)
        return PrefixHit(blocks, len(blocks) * self.block_size, unreferenced, blocks.count(ON_HOST))

    def can_admit(self, request: Request, hit: PrefixHit) -> bool:
        """True when every known token of the request fits beside what is used now."""
        needed = self.blocks_for(request.num_tokens) - hit.num_in_cache
        return needed <= self.pool.num_available - hit.num_unreferenced

    def admit(self, request: Request, hit: PrefixHit) -> None:
        """Give the request blocks for all its known tokens, the cached prefix first. Requires `can_admit`."""
        self.pool.acquire(block for block in hit.blocks if block != ON_HOST)
        on_host = [at for at, block in enumerate(hit.blocks) if block == ON_HOST]
        claimed = [self.swap.claim(request.block_hashes[at]) for at in on_host]
        self.await_no_more(request)  # what it cannot go on from is not worth keeping
        fresh = self.pool.allocate(self.blocks_for(request.num_tokens) - hit.num_in_cache)
        if fresh is None:
            raise RuntimeError("admit() without can_admit()")
        request.block_ids = hit.blocks + fresh[len(on_host) :]
        for at, host_block, block in zip(on_host, claimed, fresh, strict=False):
            request.block_ids[at] = block
            self.swap.restore(host_block, block)
            self.pool.publish(block, request.block_hashes[at])
        request.num_computed_tokens = hit.num_tokens
        request.num_published_blocks = len(hit.blocks)
        request.num_shared_blocks = hit.num_shared

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Extend the block table to hold ``num_tokens`` tokens; False (and nothing changed) when blocks are short."""
        if num_tokens <= len(request.block_ids) * self.block_size:
            return True
        fresh = self.pool.allocate(self.blocks_for(num_tokens) - len(request.block_ids))
        if fresh is None:
            return False
        request.block_ids += fresh
        return True

    def grow_all(self, requests: Sequence[Request], num_tokens: int) -> bool:
        """Extend each table for so many more computed tokens; False (and nothing changed) when blocks are short."""
        missing = [self.blocks_for(each.num_computed_tokens + num_tokens) - len(each.block_ids) for each in requests]
        fresh = self.pool.allocate(sum([count for count in missing if count > 0]))
        if fresh is None:
            return False
        used = 0
        for request, count in zip(requests, missing, strict=True):
            if count > 0:
                request.block_ids += fresh[used : used + count]
                used += count
        return True

    def publish_computed(self, request: Request, num_computed_tokens: int) -> None:
        """Make blocks findable that are full of known tokens, ``num_computed_tokens`` of which have their KV.

        Called when the step that computes them is scheduled. Whoever finds them, in this very step or in one scheduled
        while it is in flight, reads what was written: a layer's KV is in one pipeline stage, every stage computes all
        steps in the order of their ids and drops none, and a step writes all its KV of a layer before it reads any.
        A block whose last token is still being sampled is published by a later call.
        """
        if not self.enable_prefix_caching:
            return
        full = min(num_computed_tokens, request.num_tokens) // self.block_size
        if full <= request.num_published_blocks:
            return
        self._extend_hashes(request)
        for position in range(request.num_published_blocks, full):
            self.pool.publish(request.block_ids[position], request.block_hashes[position])
        request.num_published_blocks = full

    def release(self, request: Request, awaited: bool = False) -> None:
        """Give all blocks back; what was published stays findable until evicted, last if the request is to return."""
        if awaited:
            self.swap.expect(request.seq_id, request.block_hashes[: request.num_published_blocks])
        self.pool.release(request.block_ids, self.swap.expected)
        if awaited:  # a twin of a block may be the one that can be found
            for block_hash in reversed(request.block_hashes[: request.num_published_blocks]):
                block = self.pool.find(block_hash)
                if block is not None:
                    self.pool.await_content(block)
        request.block_ids = []

    def await_no_more(self, request: Request) -> None:
        """The request that was released as awaited has returned, or never will."""
        for block_hash in self.swap.forget(request.seq_id):
            block = self.pool.find(block_hash)
            if block is not None:
                self.pool.await_no_more(block)

    def _extend_hashes(self, request: Request) -> None:
        size, hashes = self.block_size, request.block_hashes
        for position in range(len(hashes), request.num_tokens // size):
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, request.token_ids[position * size : (position + 1) * size]))
