"""A picture of the engine at one moment, for metrics and routing. Plain data."""

from __future__ import annotations

import msgspec

from ridgewalk.engine.scheduler import AttentionGroup, Scheduler


class GroupStats(msgspec.Struct, frozen=True):
    """One attention group."""

    used_blocks: int
    cached_blocks: int  # evictable
    free_blocks: int
    unfilled_slots: int  # slots of used blocks that hold no computed token
    num_running: int
    throttled: bool = False  # the last schedule left work waiting for want of this group's KV alone
    num_throttled: int = 0  # schedules that did, or that preempted for want of it: a counter
    predicted_peak_blocks: float | None = None  # the most that what runs will use at one time; None: not predicted


class EngineStats(msgspec.Struct, frozen=True):
    """One replica. Counters grow from the replica's start."""

    groups: list[GroupStats]
    block_size: int
    num_waiting: int
    num_preemptions: int
    recomputed_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    throttled_seconds: float
    head_of_line_blocks: int = 0  # KV blocks that the first waiting sequence needs, prefix hits aside; 0: none waits
    computed_tokens: int = 0  # recomputed ones included
    swapped_out_blocks: int = 0  # copied to the host
    swapped_in_blocks: int = 0  # copied back
    swap_blocks: int = 0  # of the swap space
    used_swap_blocks: int = 0

    @property
    def throttled(self) -> bool:
        """True when work waits for want of KV alone, in any group."""
        return any(group.throttled for group in self.groups)


def snapshot(scheduler: Scheduler, throttled_seconds: float) -> EngineStats:
    """Read everything off the scheduler."""
    counters = scheduler.counters
    head = scheduler.waiting[0] if scheduler.waiting else None
    spaces = [group.kv.swap for group in scheduler.groups]
    return EngineStats(
        groups=[
            _group_stats(group, peak) for group, peak in zip(scheduler.groups, scheduler.predicted_peaks(), strict=True)
        ],
        block_size=scheduler.config.block_size,
        num_waiting=scheduler.num_waiting,
        num_preemptions=counters.num_preemptions,
        recomputed_tokens=counters.recomputed_tokens,
        prefix_cache_queries=counters.prefix_cache_queries,
        prefix_cache_hits=counters.prefix_cache_hits,
        prompt_tokens=counters.prompt_tokens,
        generation_tokens=counters.generation_tokens,
        steps=counters.steps,
        throttled_seconds=throttled_seconds,
        head_of_line_blocks=scheduler.groups[0].kv.blocks_for(head.num_tokens) if head else 0,
        computed_tokens=counters.computed_tokens,
        swapped_out_blocks=sum(space.num_copied_out for space in spaces),
        swapped_in_blocks=sum(space.num_copied_in for space in spaces),
        swap_blocks=sum(space.num_blocks for space in spaces),
        used_swap_blocks=sum(space.num_used for space in spaces),
    )


def _group_stats(group: AttentionGroup, predicted_peak: float | None) -> GroupStats:
    """Shared blocks are full by construction, so unfilled slots are counted once although tables overlap."""
    pool = group.kv.pool
    return GroupStats(
        used_blocks=pool.num_used,
        cached_blocks=pool.num_cached,
        free_blocks=pool.num_free,
        unfilled_slots=sum(
            len(request.block_ids) * group.kv.block_size - request.num_computed_tokens for request in group.running
        ),
        num_running=len(group.running),
        throttled=group.throttled,
        num_throttled=group.num_throttled,
        predicted_peak_blocks=predicted_peak,
    )
