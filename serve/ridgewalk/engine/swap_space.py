"""Host memory behind the KV cache of one attention group: what preempted requests will need again.

Blocks of a preempted request stay in the cache, to be evicted last. One that is evicted while its request still waits
is copied to the host instead of lost, and copied back when the request returns: so only what others really needed is
moved. What a request then computes again is what it had beyond its last whole block that was published, at most two
blocks, unless the space was full or another group takes it.

Ranks make the copies in the order in which they were decided, before they compute the step. A block is evicted only
when no step in flight refers to it, so its content is there by then, in every pipeline stage.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from ridgewalk.engine.step import BlockCopy


class SwapSpace:
    """Host blocks ``0 .. num_blocks - 1``, found by the hash of their content.

    When all are taken, the first that was copied makes way. The cache evicts a request's last block first, so that
    what is left of it is its beginning, from which it can go on.

    Without host blocks it only knows what is expected.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_copied_out = 0  # blocks, since the start
        self.num_copied_in = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._host_block_of: OrderedDict[bytes, int] = OrderedDict()  # in the order of copying
        self.expected: Counter[bytes] = Counter()  # how many waiting requests need a content
        self._expected_by: dict[int, list[bytes]] = {}  # seq_id
        self._copies: list[BlockCopy] = []

    @property
    def num_used(self) -> int:
        """Host blocks with content."""
        return len(self._host_block_of)

    def expect(self, seq_id: int, block_hashes: Sequence[bytes]) -> None:
        """A request was preempted that had these blocks."""
        self._expected_by[seq_id] = list(block_hashes)
        self.expected.update(block_hashes)

    def forget(self, seq_id: int) -> list[bytes]:
        """The request has returned, or never will. Returns what nobody expects any more; its host blocks are free."""
        unexpected = []
        for block_hash in self._expected_by.pop(seq_id, ()):
            self.expected[block_hash] -= 1
            if self.expected[block_hash] == 0:
                del self.expected[block_hash]
                unexpected.append(block_hash)
                host_block = self._host_block_of.pop(block_hash, None)
                if host_block is not None:
                    self._free.append(host_block)
        return unexpected

    def holds(self, block_hash: bytes) -> bool:
        """Whether the content can be copied back."""
        return block_hash in self._host_block_of

    def on_evicted(self, block: int, block_hash: bytes) -> None:
        """A block of the cache is about to lose its content."""
        if block_hash not in self.expected or block_hash in self._host_block_of:
            return
        if self._free:
            host_block = self._free.pop()
        elif self._host_block_of:
            host_block = self._host_block_of.popitem(last=False)[1]
        else:
            return  # all are claimed
        self._host_block_of[block_hash] = host_block
        self._copies.append(BlockCopy(True, block, host_block))
        self.num_copied_out += 1

    def claim(self, block_hash: bytes) -> int:
        """Keep the host block of a content that it `holds` until it is `restore`d: blocks evicted for the request that
        needs it must not take its place."""
        return self._host_block_of.pop(block_hash)

    def restore(self, host_block: int, block: int) -> None:
        """Fill a block of the cache with what was claimed."""
        self._copies.append(BlockCopy(False, block, host_block))
        self._free.append(host_block)
        self.num_copied_in += 1

    def take_copies(self) -> list[BlockCopy]:
        """What was decided since the last call, for the ranks."""
        copies, self._copies = self._copies, []
        return copies

    def check_integrity(self) -> None:
        """Raise RuntimeError unless each host block is free or holds one content that somebody waits for."""
        held = list(self._host_block_of.values())
        if sorted(held + self._free) != list(range(self.num_blocks)):
            raise RuntimeError("a host block is lost, or twice in use")
        if not self._host_block_of.keys() <= self.expected.keys():
            raise RuntimeError("a host block holds what nobody waits for")
        if self.expected != Counter(block_hash for hashes in self._expected_by.values() for block_hash in hashes):
            raise RuntimeError("what is expected and by whom differ")
