"""Micro-batches: how many sequences a step of a pipeline takes, so that every stage has some to compute.

A sequence samples in at most one step in flight, for its next token depends on the last. A step that took every
runnable sequence would therefore cross the stages alone, all of them idle but one; so each takes its even share. Chunks
of one prompt follow each other without waiting: they are not shared out.
"""

from __future__ import annotations

from collections.abc import Sequence

from ridgewalk.engine.request import Request


def row_limit(num_sequences: int, open_sizes: Sequence[int], max_steps: int) -> int:
    """Sequences that the next step of an attention group may take: at least 1 when one is in no step in flight.

    Of ``num_sequences``, so many are in each step in flight (``open_sizes``); up to ``max_steps`` may be open. Spread
    evenly, ``num_sequences % max_steps`` steps hold one more than the others, and the next step is one of them unless
    as many such steps are open. So an uneven spread, left by sequences that ended, is mended within a round of steps.
    """
    share, num_larger = divmod(num_sequences, max_steps)
    num_larger_open = sum(size > share for size in open_sizes)
    return share + (num_larger_open < num_larger)


def count_prefilling(requests: Sequence[Request]) -> int:
    """Those with more than one known token left to compute: a prompt, or what a preempted request had."""
    return len([each for each in requests if not each.num_placeholders and each.num_tokens_to_compute > 1])
