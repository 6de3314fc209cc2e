"""The KV cache of one attention group as a number: for simulations, where no block has content or a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ridgewalk.engine.block_pool import BlockPool


class BlockCounter(BlockPool):
    """A `BlockPool` that counts. All its blocks are called 0, none is cached, and giving out many costs as one."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(1)
        self.num_blocks = num_blocks
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_available(self) -> int:
        return self._num_free

    def allocate(self, count: int) -> list[int] | None:
        if count > self._num_free:
            return None
        self._num_free -= count
        return [0] * count

    def acquire(self, blocks: Iterable[int]) -> None:
        """Nothing can be found here, so there is nothing to acquire."""
        if any(True for _ in blocks):
            raise RuntimeError("a counter of blocks has none that could be found")

    def release(self, blocks: Sequence[int], awaited: bool = False) -> None:
        self._num_free += len(blocks)

    def check_integrity(self) -> None:
        if not 0 <= self._num_free <= self.num_blocks:
            raise RuntimeError(f"{self._num_free} of {self.num_blocks} blocks are free")
