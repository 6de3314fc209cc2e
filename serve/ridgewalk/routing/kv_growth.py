"""Each request goes where it delays everybody least, by how far its KV cache is expected to grow.

The cost of a replica is what the sum of  latency^2 / output^(3/4)  over all open requests grows by when the request
goes there (output: its tokens): its own share, and for each request j that is there already, 2 x latency(j) x (what j
is held up) / output(j)^(3/4). Taking what increases such a sum least is the greedy rule of Awerbuch et al. (1995, load
balancing in the L_p norm). It is what parts the long from the short without a threshold: a second costs a request in
proportion to how long it takes, so a long reasoner seeks the fastest steps that it can get, in big groups, and a short
request keeps out of the way of long ones. The square of latency alone, the usual compromise between mean and maximum
(Bansal and Pruhs 2003), sees nothing but the long ones: a short request's time per token may double and costs little.
Latency times time per token, which is latency^2 / output, cares for every token alike. The exponent is in between:
simulated on 8 x H200, p99 with 3/4 is within 2 % of that with 0, and 5 to 14 % more requests keep a tight limit on
TPOT. On a small machine that has more to do than it can 0 is better (tests/benchmarks/RESULTS.md).

Latency is predicted as  wait + prompt tokens not cached x prefill time + output tokens x step time.  Step time is the
placement's `StepPace`, synchronization included, as measured on all its replicas; output tokens are those of the
request's class (`OutputLengths`, learned from what ended here). One more sequence makes each step longer by its own
terms of the pace, and for as many steps as both are there.

A request may ask for a pace (`LatencySlo`). Of the replicas with room those come first where the fewest requests are
expected to miss theirs for it: the request itself, by the predicted time to its first token and step time (a wait for
KV spread over its output), and those that would then miss, and would not have without it, the mean time per token that
they ask for, tokens that they have included. Cost decides between equals, so that among requests which ask for nothing
nothing changes. An ingress knows what its own requests ask for, and not those of other ingresses.

KV capacity counts twice. A replica is full where its seats are taken, or where the request at its expected end, beside
what is in use now and what was sent since the report, is over the capacity of every attention group: it takes nothing
while another is not. Where only the *predicted* peak of KV use, with the admission's margin, would be over it, the
request may have to wait for those that hold the KV, and that wait is part of the cost. A veto there as well was worse
where a replica holds few long requests and nobody shows who is long: it stood half idle beside a crowded one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ridgewalk.engine.output_lengths import Array
from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.routing.decision import RoutingDecision, RoutingReason
from ridgewalk.routing.latency_slo import LatencySlo
from ridgewalk.routing.least_loaded import least_loaded
from ridgewalk.routing.length_forecast import EASE, LengthForecast
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from ridgewalk.routing.prefix_index import PrefixIndex
from ridgewalk.routing.replica_load import ReplicaLoad
from ridgewalk.routing.step_pace import PaceEstimate, StepPace

REFRESH_S = 0.25
"""How long what is known of open sequences stands: some tens of tokens of each."""

HOLDINGS = 6.0
"""Times for which a block of KV is held that pass until a whole cache's worth of it has been given back. Two, if those
that hold it ended evenly; more, as only those give way which would be there at the predicted peak. Fitted in
simulation: 4 to 8 differ by less than seeds do, 1 lets short requests wait behind long ones."""

PREFILL_HALF_LIFE = 64
"""Steps after which prompts that a replica computed count half: a second or two."""


@dataclass(frozen=True)
class _Growth:
    """What a request, all its sequences together, is expected to ask of a replica."""

    count: int
    prompt_tokens: float  # of one sequence; resumed tokens are computed like a prompt
    output_tokens: float  # of one, expected
    output_power: float  # the mean of its power of 2 - `EASE`
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
    output_tokens: Array = field(default_factory=lambda: np.zeros(0))  # written here, and remaining
    final_tokens: Array = field(default_factory=lambda: np.zeros(0))  # of KV, at its end
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
    lacks_seats: bool
    lacks_kv: bool  # even if nothing grew but the request
    num_late: int  # requests that would miss, for this one, what they ask for; itself included
    cost: float
    cost_uncached: float  # if nothing of the prompt were cached
    at_once: tuple[int, float]  # `num_late` and `cost`, if there were KV for it

    @property
    def is_full(self) -> bool:
        """It has no place now."""
        return self.lacks_seats or self.lacks_kv

    @property
    def preference(self) -> tuple[int, float, int]:
        """The least is the best."""
        return self.num_late, self.cost, self.load.num_sequences


@dataclass(frozen=True)
class _Held:
    """How long what a replica has is held. Sequences of other ingresses are taken to be like the new one."""

    steps: float  # for which a sequence goes on
    kv_steps: float  # for which a token of KV is held

    @classmethod
    def on(cls, growth: _Growth, load: ReplicaLoad, there: _Open) -> _Held:
        """By all that run or wait there; without any, as for the request itself."""
        unknown = max(load.num_sequences - len(there.sequences), 0)
        sequences, tokens = unknown + len(there.sequences), unknown * growth.final_tokens + there.final_tokens.sum()
        if not sequences:
            return cls(growth.output_tokens, growth.output_tokens)
        steps = unknown * growth.output_tokens + there.remaining.sum()
        kv_steps = unknown * growth.final_tokens * growth.output_tokens + there.remaining @ there.final_tokens
        return cls(float(steps) / sequences, float(kv_steps / tokens))


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
        remaining = max(1.0, self._lengths.of_new(sequence.new).mean)
        there.remaining = np.append(there.remaining, remaining)
        there.output_tokens = np.append(there.output_tokens, remaining)
        there.final_tokens = np.append(there.final_tokens, sequence.new.num_known_tokens + remaining)
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
            there.output_tokens = np.array([float(each.num_written) for each in sequences]) + there.remaining
            there.final_tokens = (
                np.array([float(each.new.num_known_tokens) for each in sequences]) + there.output_tokens
            )
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
            max(1.0, sum(each.mean for each in remaining) / count),
            sum(each.power for each in remaining) / count,
            # Who had tokens elsewhere has had its first.
            request[0].slo if request[0].num_resumed_tokens == 0 else LatencySlo(tpot_s=request[0].slo.tpot_s),
        )

    def _rate(self, growth: _Growth, load: ReplicaLoad, pace: StepPace, cached: int, now: float) -> _Option:
        there = self._open.get(load.replica_id, _Open())
        coming = _coming_blocks(growth, load, there)
        running, used = min(load.num_sequences, load.num_seats), load.total_blocks - load.available_blocks
        per_step = _per_step(growth, pace, running, load.block_size)
        prefill_s = pace.prefill_token_s * there.prefill_tokens  # of others, as it has been
        step_s = pace.step_s(running, used) + prefill_s + growth.count * per_step
        wait_s = _wait_s(growth, load, coming, _Held.on(growth, load, there), step_s)
        own_prefill_s, uncached_s = (
            pace.prefill_token_s * tokens for tokens in (max(growth.prompt_tokens - cached, 1.0), growth.prompt_tokens)
        )
        others, others_uncached = (
            self._delay_of_others(growth, load, there, seconds, step_s, per_step, now)
            for seconds in (own_prefill_s, uncached_s)
        )
        late_before = there.num_late(step_s - growth.count * per_step)
        late_after = there.num_late(step_s, growth.count * own_prefill_s)
        before_s = pace.prefill_token_s * there.pending_prompt_tokens  # prompts that are served first

        def num_late(waiting_s: float) -> int:
            first_s = waiting_s + before_s + growth.count * own_prefill_s + step_s
            # A wait is no pace; but who waits longer than it saves is not helped by fast steps.
            token_s = step_s + waiting_s / growth.output_tokens
            is_late = first_s > growth.slo.ttft_s or token_s > growth.slo.tpot_s
            return growth.count * is_late + late_after - late_before

        return _Option(
            load,
            lacks_seats=load.num_sequences + growth.count > load.num_seats,
            lacks_kv=coming > max(group.available_blocks for group in load.groups),
            num_late=num_late(wait_s),
            cost=_own_delay(growth, wait_s, own_prefill_s, step_s) + others,
            cost_uncached=_own_delay(growth, wait_s, uncached_s, step_s) + others_uncached,
            at_once=(num_late(0.0), _own_delay(growth, 0.0, own_prefill_s, step_s) + others),
        )

    def _delay_of_others(
        self, growth: _Growth, load: ReplicaLoad, there: _Open, prefill_s: float, step_s: float, per_step: float,
        now: float,
    ) -> float:  # fmt: skip
        """What those that are there are held up, for each sequence of the request; in the units of the cost."""
        latency = now - there.sent_at + there.remaining * step_s
        held_up = prefill_s + np.minimum(there.remaining, growth.output_tokens) * per_step
        unknown = max(load.num_sequences - len(there.sequences), 0)  # of other ingresses: taken to be like this one
        eased = math.pow(growth.output_tokens, 1 - EASE)
        alike = unknown * eased * step_s * (prefill_s + growth.output_tokens * per_step)
        return 2 * (float(np.sum(latency * held_up / there.output_tokens**EASE)) + alike)


def _own_delay(growth: _Growth, wait_s: float, prefill_s: float, step_s: float) -> float:
    """Mean of latency^2 / output^`EASE` of a sequence of the request."""
    first_s, eased = wait_s + growth.count * prefill_s, math.pow(growth.output_tokens, 1 - EASE)
    return first_s**2 * eased / growth.output_tokens + 2 * first_s * eased * step_s + growth.output_power * step_s**2


def _per_step(growth: _Growth, pace: StepPace, running: int, block_size: int) -> float:
    """Seconds by which a sequence makes each step of those that run longer, half-way through its output."""
    return (
        pace.more_s(running, growth.count)
        + pace.block_s * (growth.prompt_tokens + growth.output_tokens / 2) / block_size
    )


def _coming_blocks(growth: _Growth, load: ReplicaLoad, there: _Open) -> float:
    """Blocks that the request, and what was sent since the report, will have at their end in a group of the replica."""
    pending = max(load.num_sequences - load.num_running, 0)
    # What others sent is like what we sent, or where we sent nothing, like the request itself.
    each = there.pending_tokens / there.num_pending if there.num_pending else growth.final_tokens
    own = math.ceil(growth.count / len(load.groups))  # each sequence goes to a group by itself
    return (pending * each / len(load.groups) + own * growth.final_tokens) / load.block_size


def _wait_s(growth: _Growth, load: ReplicaLoad, coming_blocks: float, held: _Held, step_s: float) -> float:
    """Seconds until there is room: what is too much is given back as evenly as those that hold KV, or seats, end."""
    excess = min((group.peak_blocks + coming_blocks) / group.total_blocks - 1 for group in load.groups)
    seats = (load.num_sequences + growth.count) / load.num_seats - 1
    return max(HOLDINGS * excess * held.kv_steps, seats * held.steps, 0.0) * step_s


def _decide(options: Sequence[_Option]) -> RoutingDecision:
    open_ones = [option for option in options if not option.is_full]
    best = min(open_ones or options, key=lambda option: option.preference)
    replica_id = best.load.replica_id
    if not open_ones:
        return RoutingDecision(replica_id, RoutingReason.ALL_FULL)
    if any(not each.lacks_seats and each.at_once < best.preference[:2] for each in options if each is not best):
        return RoutingDecision(replica_id, RoutingReason.KV_CLIFF)
    if any(option.cost < best.cost for option in open_ones):
        return RoutingDecision(replica_id, RoutingReason.LATENCY_SLO)
    if any(option.cost_uncached < best.cost_uncached for option in open_ones):
        return RoutingDecision(replica_id, RoutingReason.CACHED_PREFIX)
    others = [option for option in options if option.load.shape != best.load.shape]
    if not others:
        return RoutingDecision(replica_id, RoutingReason.LEAST_DELAY)
    other = min(others, key=lambda option: option.cost).load
    pooled = max(group.total_blocks for group in best.load.groups) > max(group.total_blocks for group in other.groups)
    return RoutingDecision(replica_id, RoutingReason.POOLED_KV if pooled else RoutingReason.FEWER_RANKS)
