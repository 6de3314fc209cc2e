"""Each request goes where it delays everybody least, by how far its KV cache is expected to grow.

The cost of a replica is what the sum of squared latencies of all open requests grows by when the request goes there, in
seconds squared: its own square, and for each request j that is there already, 2 x latency(j) x (what j is held up).
Taking what increases the sum of squares least is the greedy rule of Awerbuch et al. (1995, load balancing in the L_p
norm); the square of latency is the usual compromise between mean and maximum (Bansal and Pruhs 2003). It is what parts
the long from the short without a threshold. A second costs a request in proportion to how long it takes, so a long
reasoner seeks the fastest steps that it can get, in big groups, and a short request keeps out of the way of long ones:
its own seconds are few, wherever it runs.

Latency is predicted as  wait + prompt tokens not cached x prefill time + output tokens x step time.  Step time is the
placement's `StepPace`, synchronization included, as measured on all its replicas; output tokens are those of the
request's class (`OutputLengths`, learned from what ended here). One more sequence makes each step longer by its own
terms of the pace, and for as many steps as both are there.

A request may ask for a pace (`LatencySlo`). Of the replicas with room those come first where the fewest requests are
expected to miss theirs for it: the request itself, by the predicted time to its first token and step time, and those
that would then miss, and would not have without it, the mean time per token that they ask for, tokens that they have
included. Cost decides between equals, so that among requests which ask for nothing nothing changes. An ingress knows
what its own requests ask for, and not those of other ingresses.

A replica has room when a seat is free and the predicted peak of KV use of some attention group, what was sent since
the report included, leaves place for the request at its expected end. Those without room take nothing while another
has some. When none has any, the wait for it is part of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ridgewalk.engine.output_lengths import Array
from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.routing.decision import RoutingDecision, RoutingReason
from ridgewalk.routing.latency_slo import LatencySlo
from ridgewalk.routing.least_loaded import least_loaded
from ridgewalk.routing.length_forecast import LengthForecast
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.prefix_index import PrefixIndex
from ridgewalk.routing.replica_load import ReplicaLoad
from ridgewalk.routing.step_pace import PaceEstimate, StepPace

REFRESH_S = 0.25
"""How long what is known of open sequences stands: some tens of tokens of each."""

PREFILL_HALF_LIFE = 64
"""Steps after which prompts that a replica computed count half: a second or two."""


@dataclass(frozen=True)
class _Growth:
    """What a request, all its sequences together, is expected to ask of a replica."""

    count: int
    prompt_tokens: float  # of one sequence; resumed tokens are computed like a prompt
    output_tokens: float  # of one, expected
    output_square: float
    slo: LatencySlo

    @property
    def final_tokens(self) -> float:
        """Of one sequence, when it ends."""
        return self.prompt_tokens + self.output_tokens


@dataclass
class _Open:
    """This ingress's sequences on one replica, and what was known of them at the last refresh."""

    sequences: dict[OpenSequence, None] = field(default_factory=dict)  # in the order of sending
    refreshed: float = -np.inf
    remaining: Array = field(default_factory=lambda: np.zeros(0))  # output tokens
    sent_at: Array = field(default_factory=lambda: np.zeros(0))
    prefill_tokens: float = 0.0  # of a step, lately
    pending_tokens: float = 0.0  # that those which have no output yet will have at their end
    num_pending: int = 0
    pending_prompt_tokens: float = 0.0  # of them: yet to be computed, as far as is known here
    tpot_limit: Array = field(default_factory=lambda: np.zeros(0))  # asked for; infinite: nothing
    further_tokens: Array = field(default_factory=lambda: np.zeros(0))  # after the first, written here
    further_s: Array = field(default_factory=lambda: np.zeros(0))  # which they took

    def num_late(self, step_s: float, held_up_s: float = 0.0) -> int:
        """Sequences that miss the TPOT they ask for, if steps take so long."""
        if not np.isfinite(self.tpot_limit).any():
            return 0
        seconds = self.further_s + held_up_s + self.remaining * step_s
        return int(np.sum(seconds > self.tpot_limit * (self.further_tokens + self.remaining)))


@dataclass(frozen=True)
class _Option:
    """One replica, rated."""

    load: ReplicaLoad
    has_room: bool
    num_late: int  # requests that would miss, for this one, what they ask for; itself included
    cost: float
    cost_uncached: float  # if nothing of the prompt were cached

    @property
    def preference(self) -> tuple[int, float, int]:
        """The least is the best."""
        return self.num_late, self.cost, self.load.num_sequences


class KvGrowth:
    """Implements `RoutingPolicy`. Memory is bounded by what is open, and by `PrefixIndex`.

    Until it has seen a sequence end, and while a placement's pace is not known, it chooses as `least_loaded`, by the
    seats that KV has room for.
    """

    def __init__(self, max_model_len: int) -> None:
        self._lengths = LengthForecast(max_model_len)
        self._prefixes = PrefixIndex()
        self._open: dict[str, _Open] = {}
        self._refreshed = -np.inf
        self._estimates: dict[str, PaceEstimate] = {}  # by placement
        self._paces: dict[str, StepPace] = {}

    def choose(
        self, request: Sequence[NewSequence], loads: Sequence[ReplicaLoad], now: float
    ) -> RoutingDecision | None:
        """The replica for a request; None when there is none. ``now``: monotonic seconds."""
        if len(loads) < 2:
            return least_loaded(loads)
        self._refresh(now)
        growth = self._growth(request)
        if self._lengths.num_seen == 0 or any(load.placement not in self._paces for load in loads):
            return least_loaded(loads, growth.count, growth.final_tokens)
        seen = self._prefixes.cached_tokens(request[0].prefix)
        cached = {load.replica_id: seen.get(load.replica_id, 0) if load.caches_prefixes else 0 for load in loads}
        options = [
            self._rate(growth, load, self._paces[load.placement], cached[load.replica_id], now) for load in loads
        ]
        return _decide(options)

    def on_steps(self, replica_id: str, placement: str, steps: StepMeans) -> None:
        """Learn how long steps take, and how many prompt tokens the replica computes beside them."""
        there = self._open.get(replica_id)
        if there is not None:
            faded = 0.5 ** (steps.steps / PREFILL_HALF_LIFE)
            there.prefill_tokens = faded * there.prefill_tokens + (1 - faded) * steps.prefill_tokens
        self._estimates.setdefault(placement, PaceEstimate()).observe(steps)

    def on_sent(self, sequence: OpenSequence) -> None:
        """It counts from now on."""
        there = self._open.setdefault(sequence.replica_id, _Open())
        there.sequences[sequence] = None
        remaining = self._lengths.of_new(sequence.new).mean
        there.remaining = np.append(there.remaining, remaining)
        there.sent_at = np.append(there.sent_at, sequence.sent_at)
        there.tpot_limit = np.append(there.tpot_limit, sequence.new.slo.tpot_s)
        there.further_tokens = np.append(there.further_tokens, 0.0)
        there.further_s = np.append(there.further_s, 0.0)
        there.pending_tokens += sequence.new.num_known_tokens + remaining
        there.num_pending += 1
        there.pending_prompt_tokens += sequence.new.num_known_tokens
        self._prefixes.note(sequence.new.prefix, sequence.replica_id)

    def on_ended(self, sequence: OpenSequence, stopped: bool) -> None:
        """Learn its length; ``stopped``: it ended by itself, rather than at a limit or on somebody's word."""
        there = self._open.get(sequence.replica_id)
        if there is not None and sequence in there.sequences:
            del there.sequences[sequence]
            there.refreshed = -np.inf
            if not there.sequences:
                del self._open[sequence.replica_id]
        self._lengths.observe(sequence, stopped)

    def _refresh(self, now: float) -> None:
        if now - self._refreshed >= REFRESH_S:
            self._refreshed = now
            self._lengths.refresh(each for there in self._open.values() for each in there.sequences)
            paces = {placement: estimate.pace() for placement, estimate in self._estimates.items()}
            self._paces = {placement: pace for placement, pace in paces.items() if pace is not None}
        for there in self._open.values():
            if now - there.refreshed < REFRESH_S:
                continue
            there.refreshed = now
            sequences = list(there.sequences)
            there.remaining = self._lengths.of_open(sequences)
            there.sent_at = np.array([each.sent_at for each in sequences])
            there.tpot_limit = np.array([each.new.slo.tpot_s for each in sequences])
            there.further_tokens = np.array([max(each.num_written - 1.0, 0.0) for each in sequences])
            there.further_s = np.array(
                [0.0 if each.first_token_at is None else now - each.first_token_at for each in sequences]
            )
            pending = [
                (each.new.num_known_tokens, left)
                for each, left in zip(sequences, there.remaining, strict=True)
                if each.num_written == 0
            ]
            there.num_pending = len(pending)
            there.pending_prompt_tokens = sum(known for known, _ in pending)
            there.pending_tokens = there.pending_prompt_tokens + float(sum(left for _, left in pending))

    def _growth(self, request: Sequence[NewSequence]) -> _Growth:
        remaining = [self._lengths.of_new(new) for new in request]
        count = len(request)
        return _Growth(
            count,
            sum(new.num_known_tokens for new in request) / count,
            sum(each.mean for each in remaining) / count,
            sum(each.square for each in remaining) / count,
            # Who had tokens elsewhere has had its first.
            request[0].slo if request[0].num_resumed_tokens == 0 else LatencySlo(tpot_s=request[0].slo.tpot_s),
        )

    def _rate(self, growth: _Growth, load: ReplicaLoad, pace: StepPace, cached: int, now: float) -> _Option:
        there = self._open.get(load.replica_id, _Open())
        pending = max(load.num_sequences - load.num_running, 0)
        # What others sent is like what we sent, or where we sent nothing, like the request itself.
        each = there.pending_tokens / there.num_pending if there.num_pending else growth.final_tokens
        excess = _excess_blocks(growth, load, pending * each)
        has_room = excess <= 0 and load.num_sequences + growth.count <= load.num_seats
        used = load.total_blocks - load.available_blocks
        per_step = _per_step(growth, pace, load.block_size)
        prefill_s = pace.prefill_token_s * there.prefill_tokens  # of others, as it has been
        step_s = pace.step_s(min(load.num_sequences, load.num_seats), used) + prefill_s + growth.count * per_step
        wait_s = 0.0 if has_room else _wait_s(growth, load, pending, each, max(excess, 0.0), step_s)
        own_prefill_s, uncached_s = (
            pace.prefill_token_s * tokens for tokens in (max(growth.prompt_tokens - cached, 1.0), growth.prompt_tokens)
        )
        costs = [
            self._cost(growth, load, there, wait_s, seconds, step_s, per_step, now)
            for seconds in (own_prefill_s, uncached_s)
        ]
        before_s = pace.prefill_token_s * there.pending_prompt_tokens  # prompts that are served first
        first_s = wait_s + before_s + growth.count * own_prefill_s + step_s
        is_late = first_s > growth.slo.ttft_s or step_s > growth.slo.tpot_s
        late_before = there.num_late(step_s - growth.count * per_step)
        late_after = there.num_late(step_s, growth.count * own_prefill_s)
        return _Option(load, has_room, growth.count * is_late + late_after - late_before, *costs)

    def _cost(
        self, growth: _Growth, load: ReplicaLoad, there: _Open, wait_s: float, prefill_s: float, step_s: float,
        per_step: float, now: float,
    ) -> float:  # fmt: skip
        """Seconds squared for each sequence of the request."""
        first_s = wait_s + growth.count * prefill_s
        own = first_s**2 + 2 * first_s * growth.output_tokens * step_s + growth.output_square * step_s**2
        latency = now - there.sent_at + there.remaining * step_s
        held_up = prefill_s + np.minimum(there.remaining, growth.output_tokens) * per_step
        others = 2 * float(np.sum(latency * held_up))
        unknown = max(load.num_sequences - len(there.sequences), 0)  # of other ingresses: taken to be like this one
        others += 2 * unknown * growth.output_tokens * step_s * (prefill_s + growth.output_tokens * per_step)
        return own + others


def _per_step(growth: _Growth, pace: StepPace, block_size: int) -> float:
    """Seconds by which a sequence makes each step longer, half-way through its output."""
    return pace.sequence_s + pace.block_s * (growth.prompt_tokens + growth.output_tokens / 2) / block_size


def _excess_blocks(growth: _Growth, load: ReplicaLoad, pending_tokens: float) -> float:
    """Blocks by which the predicted peak would be over the capacity of the group that suits best; under 0: room."""
    share = pending_tokens / load.block_size / len(load.groups)
    need = growth.count * growth.final_tokens / load.block_size
    return min(group.peak_blocks + share + need - group.total_blocks for group in load.groups)


def _wait_s(
    growth: _Growth, load: ReplicaLoad, pending: int, pending_tokens: float, excess: float, step_s: float
) -> float:
    """Seconds until there is room. KV and seats are served at the rate at which what holds them ends.

    A sequence holds half of what it grows to, for as long as it writes: the queue asks for so many block-seconds, of
    which a replica has as many a second as it has blocks.
    """
    residence_s = growth.output_tokens * step_s
    by_seats = max(load.num_sequences + growth.count - load.num_seats, 0) / load.num_seats * residence_s
    by_kv = (pending * pending_tokens / 2 / load.block_size + excess) / load.total_blocks * residence_s
    return max(by_seats, by_kv)


def _decide(options: Sequence[_Option]) -> RoutingDecision:
    with_room = [option for option in options if option.has_room]
    best = min(with_room or options, key=lambda option: option.preference)
    replica_id = best.load.replica_id
    if not with_room:
        return RoutingDecision(replica_id, RoutingReason.ALL_FULL)
    if any(not option.has_room and option.preference < best.preference for option in options):
        return RoutingDecision(replica_id, RoutingReason.KV_CLIFF)
    if any(option.cost < best.cost for option in with_room):
        return RoutingDecision(replica_id, RoutingReason.LATENCY_SLO)
    if any(option.cost_uncached < best.cost_uncached for option in with_room):
        return RoutingDecision(replica_id, RoutingReason.CACHED_PREFIX)
    others = [option for option in options if option.load.shape != best.load.shape]
    if not others:
        return RoutingDecision(replica_id, RoutingReason.LEAST_DELAY)
    other = min(others, key=lambda option: option.cost).load
    pooled = max(group.total_blocks for group in best.load.groups) > max(group.total_blocks for group in other.groups)
    return RoutingDecision(replica_id, RoutingReason.POOLED_KV if pooled else RoutingReason.FEWER_RANKS)
