"""The KV cache of one attention group as numbered blocks: who holds them, and which full ones can be found again.

A block is in exactly one of three states: *used* (reference count over 0), *cached* (unreferenced, but its content is
known and may be found by its hash: evictable), *free*. ``free + cached + used == total`` always.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block: of its tokens and, through ``parent`` (b"" for the first), of everything before it.

    A cryptographic digest, so that a hit needs no comparison of tokens and no client can make two prompts collide
    (Python's ``hash`` can be made to).
    """
    return hashlib.blake2b(array("I", token_ids).tobytes(), key=parent, digest_size=16).digest()


class BlockPool:
    """Blocks ``0 .. num_blocks - 1`` with reference counts and a cache of full blocks, evicted least recently used."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: recently used memory is warm
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, with content; first is evicted first
        self._awaited: OrderedDict[int, None] = OrderedDict()  # the same, of preempted requests: evicted last
        self._ref_counts = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self.on_evicted: Callable[[int, bytes], None] | None = None  # told of each block whose content is given up

    @property
    def num_free(self) -> int:
        """Blocks without content worth keeping."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Unreferenced blocks whose content may still be found."""
        return len(self._cached) + len(self._awaited)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free and evictable ones."""
        return len(self._free) + len(self._cached) + len(self._awaited)

    @property
    def num_used(self) -> int:
        """Blocks that somebody references."""
        return self.num_blocks - self.num_available

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks with one reference each, evicting cached ones when no free one is left; None if too few."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def find(self, block_hash: bytes) -> int | None:
        """The block with this content, or None. It may be evicted before `acquire`d if others are allocated first."""
        return self._block_of.get(block_hash)

    def is_unreferenced(self, block: int) -> bool:
        """True when acquiring the block would take it out of the available ones."""
        return self._ref_counts[block] == 0

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that `find` returned."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del (self._awaited if block in self._awaited else self._cached)[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int], awaited: Container[bytes] = ()) -> None:
        """Drop a reference. The last of ``blocks`` becomes the first to be evicted: a prefix outlives what follows.

        ``awaited``: contents that requests will look for again. They outlive those of which nobody knows that.
        """
        for block in reversed(blocks):
            count = self._ref_counts[block] - 1
            if count < 0:
                raise RuntimeError(f"block {block} released more often than acquired")
            self._ref_counts[block] = count
            if count == 0:
                block_hash = self._hash_of.get(block)
                if block_hash is not None:
                    (self._awaited if block_hash in awaited else self._cached)[block] = None
                else:
                    self._free.append(block)

    def await_content(self, block: int) -> None:
        """Somebody will look for the block: if it is cached, it is evicted after those that nobody awaits."""
        if block in self._cached:
            del self._cached[block]
            self._awaited[block] = None

    def await_no_more(self, block: int) -> None:
        """Nobody in particular will look for the block: it is cached like any other."""
        if block in self._awaited:
            del self._awaited[block]
            self._cached[block] = None

    def publish(self, block: int, block_hash: bytes) -> None:
        """Make a full, used block findable. The first block with a content keeps it; a twin stays private."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every block is in exactly one state and the hash maps mirror each other."""
        free, cached = set(self._free), {*self._cached, *self._awaited}
        if len(free) != len(self._free) or free & cached:
            raise RuntimeError("a block is twice among the available ones")
        if self._cached.keys() & self._awaited.keys():
            raise RuntimeError("a cached block is in two queues")
        used = {block for block, count in enumerate(self._ref_counts) if count > 0}
        if used & (free | cached) or len(used) + len(free) + len(cached) != self.num_blocks:
            raise RuntimeError("free + cached + used does not equal the total")
        if any(block not in self._hash_of for block in cached) or any(block in self._hash_of for block in free):
            raise RuntimeError("a cached block has no hash, or a free one has")
        if {block: digest for digest, block in self._block_of.items()} != self._hash_of:
            raise RuntimeError("the two hash maps differ")

    def _evict(self) -> int:
        block, _ = (self._cached or self._awaited).popitem(last=False)
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        if self.on_evicted is not None:
            self.on_evicted(block, block_hash)
        return block
