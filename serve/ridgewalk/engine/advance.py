"""Many identical decode steps at once, for simulations: what `Scheduler.advance` does.

While every running sequence only decodes, nothing can be admitted and the KV cache has room, a step is like the one
before: each sequence gets one token. Such *rounds* are applied in bulk. In a pipeline a round is one step of each
micro-batch; the state between rounds is the one after an `update`, with all micro-batches but one in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from ridgewalk.engine.micro_batches import row_limit
from ridgewalk.engine.request import FinishReason, Request

if TYPE_CHECKING:
    from ridgewalk.engine.scheduler import AttentionGroup, Scheduler


def rounds_until_event(scheduler: Scheduler, at_most: int) -> int:
    """Rounds that are certain to be alike: until KV runs out or a sequence reaches its ``max_tokens``.

    0: the next step is no pure decode step of everybody (a prompt, an admission, a preemption), or micro-batches are
    uneven. An arrival changes the answer, and so does a sequence that samples a stop token: only the ranks know it, and
    who asks for ``at_most`` so many rounds.
    """
    if not scheduler.num_running or (scheduler.config.schedule_ahead and scheduler.config.max_steps_in_flight > 1):
        return 0
    if not _rotates(scheduler):
        return 0
    rounds = min(at_most, _rounds_of_decoding(scheduler))
    rounds = min(_rounds_of_room(group, rounds) for group in scheduler.groups)
    # Without room the next step preempts and asks the policy nothing; nor may this, which would teach it otherwise.
    if rounds < 1 or (scheduler.waiting and (_may_admit(scheduler) or _pauses(scheduler))):
        return 0
    if scheduler.waiting:  # the policy asks again now and then whether the first of them may begin
        steps = scheduler.admission.answer_stands(scheduler.counters.steps)
        rounds = min(rounds, steps // (1 + scheduler.num_in_flight))
    return rounds


def advance(scheduler: Scheduler, rounds: int, stopped: Collection[Request] = ()) -> list[Request]:
    """Apply ``rounds`` rounds, at most `rounds_until_event`; the requests that end with them, in order.

    ``stopped``: those whose last token is a stop token. In a pipeline none may end: there a sequence ends within a
    round, in the step of its micro-batch, which changes the rest of the round.

    Raises:
        ValueError: it would end a sequence in the middle of a pipeline's round.
    """
    if not scheduler.config.counts_only:
        raise ValueError("advance() samples nothing: it needs counts_only")
    steps_a_round = 1 + scheduler.num_in_flight
    ending = [
        request
        for group in scheduler.groups
        for request in group.running
        if len(request.token_ids) - request.num_prompt_tokens + rounds >= request.sampling.max_tokens
        or request in stopped
    ]
    if ending and steps_a_round > 1:
        raise ValueError("a sequence ends within the last round of a pipeline; advance by fewer rounds")
    for group in scheduler.groups:
        _note_throttling(scheduler, group, rounds * steps_a_round)
        _grow(scheduler, group, rounds)
    scheduler.renumber_in_flight(rounds * steps_a_round)
    for request in ending:
        scheduler.finish(request.seq_id, FinishReason.STOP if request in stopped else FinishReason.LENGTH)
    return ending


def _rounds_of_decoding(scheduler: Scheduler) -> int:
    """Rounds until a sequence reaches its ``max_tokens``; in a pipeline one less, for there it ends within a round.

    0 unless every running sequence has one token to compute, or a step in flight that samples its next.
    """
    rounds = 2**31
    for group in scheduler.groups:
        if scheduler.num_in_flight == 0 and len(group.running) > scheduler.config.max_num_batched_tokens:
            return 0
        for request in group.running:
            known, placeholders = len(request.token_ids), request.num_placeholders
            if known + placeholders - request.num_computed_tokens != 1 or request.num_in_flight != placeholders:
                return 0
            left = request.sampling.max_tokens + request.num_prompt_tokens - known
            if left < rounds:
                rounds = left
    return rounds - 1 if scheduler.num_in_flight else rounds


def _rotates(scheduler: Scheduler) -> bool:
    """Whether each micro-batch, when its turn comes, may take all its sequences again; one's turn is now."""
    if not scheduler.config.micro_batches:
        return scheduler.num_in_flight == 0
    is_due = False
    for index, group in enumerate(scheduler.groups):
        sizes = scheduler.sizes_in_flight(index)
        sizes.append(len(group.running) - sum(sizes))
        is_due = is_due or sizes[-1] > 0
        for turn, size in enumerate(sizes):
            others = sizes[:turn] + sizes[turn + 1 :]
            limit = row_limit(len(group.running), others, scheduler.config.max_steps_in_flight)
            if size > min(limit, scheduler.config.max_num_batched_tokens):
                return False
    return is_due


def _seats_left(scheduler: Scheduler, group: AttentionGroup) -> bool:
    """Whether the scheduler asks, in such a step, if the group has KV for the first waiting request."""
    config, num_running = scheduler.config, len(group.running)
    if num_running >= config.max_num_seqs:
        return False
    return config.micro_batches or num_running < config.max_num_batched_tokens


def _may_admit(scheduler: Scheduler) -> bool:
    head = scheduler.waiting[0]
    scheduler.admission.prepare(scheduler.groups, scheduler.counters.steps)
    return any(
        group.kv.can_admit(head, hit := group.kv.find_prefix(head)) and scheduler.admission.admits(head, group, hit)
        for group in scheduler.groups
        if _seats_left(scheduler, group)
    )


def _pauses(scheduler: Scheduler) -> bool:
    """Whether the engine asks for steps in vain between these, each time noting that KV is short."""
    config = scheduler.config
    return config.micro_batches and scheduler.num_in_flight + 1 < config.max_steps_in_flight


def _rounds_of_room(group: AttentionGroup, rounds: int) -> int:
    """At most ``rounds``: those for which the group has blocks."""
    size, available = group.kv.block_size, group.kv.pool.num_available
    if len(group.running) * -(-rounds // size) <= available:  # nobody needs more blocks than that
        return rounds
    room = Counter(len(request.block_ids) * size - request.num_computed_tokens for request in group.running)

    def missing(after: int) -> int:
        return sum(-(-max(0, after - slots) // size) * count for slots, count in room.items())

    if missing(rounds) <= available:
        return rounds
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if missing(middle) <= available else (low, middle)
    return low


def _note_throttling(scheduler: Scheduler, group: AttentionGroup, num_steps: int) -> None:
    group.throttled = bool(scheduler.waiting) and _seats_left(scheduler, group)
    group.num_throttled += group.throttled * num_steps


def _grow(scheduler: Scheduler, group: AttentionGroup, rounds: int) -> None:
    if not group.kv.grow_all(group.running, rounds):
        raise ValueError(f"advance() by {rounds} rounds, for which there is no KV cache")
    counters, unknown = scheduler.counters, [0] * rounds
    for request in group.running:
        # A step in flight has computed its token already: the last round's is computed by the step then in flight.
        before = request.num_computed_tokens
        request.num_computed_tokens = after = before + rounds
        if request.max_computed_tokens > before:
            counters.recomputed_tokens += min(request.max_computed_tokens, after) - before
        if request.max_computed_tokens < after:
            request.max_computed_tokens = after
        request.token_ids += unknown
    tokens = rounds * len(group.running)
    counters.computed_tokens += tokens
    counters.generation_tokens += tokens
