"""Which replica has seen the beginning of a prompt: a bounded memory at the ingress, never asked of the replicas."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

PREFIX_BLOCK = 64
"""Tokens that are hashed together: what less is shared saves too little to steer by."""

MAX_BLOCKS = 16_384
"""Blocks remembered, the least recently used forgotten first: prompts of a million tokens."""


def prefix_hashes(token_ids: Sequence[int]) -> tuple[int, ...]:
    """One number for each full block, which stands for all tokens up to its end."""
    chain, hashes = 0, []
    for start in range(0, len(token_ids) - PREFIX_BLOCK + 1, PREFIX_BLOCK):
        chain = hash((chain, *token_ids[start : start + PREFIX_BLOCK]))
        hashes.append(chain)
    return tuple(hashes)


class PrefixIndex:
    """Remembers for each block the replicas that it was sent to."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._replicas: OrderedDict[int, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def note(self, hashes: Sequence[int], replica_id: str) -> None:
        """A prompt was sent to a replica."""
        for block in reversed(hashes):  # a chain is forgotten from its end
            self._replicas.setdefault(block, set()).add(replica_id)
            self._replicas.move_to_end(block)
        while len(self._replicas) > self._max_blocks:
            self._replicas.popitem(last=False)

    def cached_tokens(self, hashes: Sequence[int]) -> dict[str, int]:
        """Tokens of the prompt that each replica has seen; those that saw none are left out."""
        found: dict[str, int] = {}
        for number, block in enumerate(hashes, 1):
            replicas = self._replicas.get(block, set())
            holders = (
                replicas
                if number == 1
                else {each for each in replicas if found.get(each) == (number - 1) * PREFIX_BLOCK}
            )
            if not holders:
                break
            found.update(dict.fromkeys(holders, number * PREFIX_BLOCK))
        return found
