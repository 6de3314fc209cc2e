"""The KV cache of one attention group as numbers: for simulations, where tokens and blocks have no ids.

What can be found again, with prefix caching, are the full blocks that a preempted request had, as long as nobody needed
them: they are evicted last, those of the request that was preempted first before others, its last block first, as a
`BlockPool` does it. Prompts are taken to have nothing in common.
"""

from __future__ import annotations

from collections import OrderedDict

from ridgewalk.engine.block_pool import BlockPool
from ridgewalk.engine.kv_cache_manager import KVCacheManager, PrefixHit
from ridgewalk.engine.request import Request
from ridgewalk.engine.scheduler_config import SchedulerConfig


class BlockCounter(BlockPool):
    """A `BlockPool` that counts. All its blocks are called 0, and giving out many costs as one."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(1)
        self.num_blocks = num_blocks
        self._num_free = num_blocks
        self._num_cached = 0
        self._kept: OrderedDict[int, int] = OrderedDict()  # of the cached ones, those awaited, by sequence

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_cached(self) -> int:
        return self._num_cached

    @property
    def num_available(self) -> int:
        return self._num_free + self._num_cached

    def allocate(self, count: int) -> list[int] | None:
        if count > self._num_free + self._num_cached:
            return None
        fresh = min(count, self._num_free)
        self._num_free -= fresh
        self._evict_blocks(count - fresh)
        return [0] * count

    def put_back(self, seq_id: int, num_full: int, num_others: int, awaited: bool) -> None:
        """Blocks of a sequence that holds none any more: full ones keep their content."""
        self._num_free += num_others
        self._num_cached += num_full
        if num_full and awaited:
            self._kept[seq_id] = num_full

    def kept(self, seq_id: int) -> int:
        """Blocks of this sequence, from its first on, that still have their content."""
        return self._kept.get(seq_id, 0)

    def reclaim(self, seq_id: int) -> None:
        """The sequence holds again what was `kept`."""
        self._num_cached -= self._kept.pop(seq_id, 0)

    def forget(self, seq_id: int) -> None:
        """The sequence will not look for its blocks again."""
        self._kept.pop(seq_id, None)

    def check_integrity(self) -> None:
        if sum(self._kept.values()) > self._num_cached or not 0 <= self.num_available <= self.num_blocks:
            raise RuntimeError(f"{self._num_free} free and {self._num_cached} cached of {self.num_blocks} blocks")

    def _evict_blocks(self, count: int) -> None:
        self._num_cached -= count
        excess = sum(self._kept.values()) - self._num_cached  # the awaited go last
        while excess > 0:
            seq_id, kept = self._kept.popitem(last=False)
            if kept > excess:
                self._kept[seq_id] = kept - excess
                self._kept.move_to_end(seq_id, last=False)
            excess -= min(kept, excess)


class CountingKVCacheManager(KVCacheManager):
    """A `KVCacheManager` over a `BlockCounter`."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(1, config.block_size, config.enable_prefix_caching)
        self.pool = self._counter = BlockCounter(config.num_blocks)

    def find_prefix(self, request: Request) -> PrefixHit:
        kept = self._counter.kept(request.seq_id)
        return PrefixHit([0] * kept, kept * self.block_size, kept)

    def admit(self, request: Request, hit: PrefixHit) -> None:
        self._counter.reclaim(request.seq_id)
        blocks = self._counter.allocate(self.blocks_for(request.num_tokens) - len(hit.blocks))
        if blocks is None:
            raise RuntimeError("admit() without can_admit()")
        request.block_ids = hit.blocks + blocks
        request.num_computed_tokens = hit.num_tokens

    def publish_computed(self, request: Request, num_computed_tokens: int) -> None:
        """Which blocks are full is seen when they are put back."""

    def release(self, request: Request, awaited: bool = False) -> None:
        full = min(request.num_computed_tokens, request.num_tokens) // self.block_size * self.enable_prefix_caching
        self._counter.put_back(request.seq_id, full, len(request.block_ids) - full, awaited)
        request.block_ids = []

    def await_no_more(self, request: Request) -> None:
        self._counter.forget(request.seq_id)


def make_kv_cache(config: SchedulerConfig) -> KVCacheManager:
    """The cache of one attention group; with ``counts_only`` one that counts."""
    if config.counts_only:
        return CountingKVCacheManager(config)
    return KVCacheManager(config.num_blocks, config.block_size, config.enable_prefix_caching, config.num_swap_blocks)
