"""Why a placement is where it is in the ranking, in words."""

from __future__ import annotations

from ridgewalk.planning.planner import Candidate
from ridgewalk.planning.simulator import Outcome
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo

SYNCHRONIZATION = ("all_reduce", "dispatch_combine", "send", "ranks", "straggle")
NOTABLE = 0.05
"""A share of the time, or a difference of shares, worth a word."""

TERMS = {
    "weights": "reading weights",
    "products": "matrix products",
    "attention": "attention over the KV cache",
    "all_reduce": "all-reduce among tensor-parallel ranks",
    "dispatch_combine": "dispatch and combine among expert-parallel ranks",
    "launch": "starting kernels",
    "send": "handing over to the next stage",
    "ranks": "telling the ranks, and waiting for the last to begin",
    "straggle": "waiting in collectives for the slowest rank",
    "host": "the host between steps",
    "idle": "idle: finished early, or waiting for a stage, for the host or for requests",
}
"""Terms of a placement's time, in the order of telling."""


def shares(outcome: Outcome) -> dict[str, float]:
    """The share of the makespan that each term takes, mean of all replicas and stages; they add up to 1."""
    spent = {term: outcome.spent_s.get(term, 0.0) / outcome.makespan_s for term in TERMS if term != "idle"}
    return {**spent, "idle": max(0.0, 1.0 - sum(spent.values()))}


def reason(candidate: Candidate, best: Candidate, slo: LatencySlo = NO_SLO) -> str:
    """One sentence: what decided for it or against it. ``slo``: what was ranked by, if it was."""
    outcome = candidate.outcome
    if outcome is None or best.outcome is None:
        return f"cannot be loaded: {candidate.problem}"
    kept = "" if slo == NO_SLO else f"{outcome.goodput_per_s(slo):.2f} requests a second within the limits; "
    if candidate is best:
        return f"best: {kept}{_account(outcome)}"
    share = outcome.throughput_tokens_per_s / best.outcome.throughput_tokens_per_s
    if not candidate.simulated:
        return (
            f"at most {share:.0%} of the best's throughput, so it was not simulated (its figures are bounds): "
            f"{_bound(outcome, best.outcome)}"
        )
    return f"{kept}{share:.0%} of the best's throughput: {_complaint(outcome, best.outcome)}"


def _bound(outcome: Outcome, best: Outcome) -> str:
    crossing = f"a token takes {outcome.tpot_p50_s * 1e3:.1f} ms or more to cross the stages"
    if outcome.at_best == "kv":
        return (
            f"capacity cliff, room for {_tokens(outcome.kv_capacity_tokens)} tokens of KV where the best has "
            f"{_tokens(best.kv_capacity_tokens)}, held the longer as {crossing}"
        )
    if outcome.at_best == "seats":
        return f"synchronization cliff, {crossing}, and there are too few seats for all (max_num_seqs)"
    return f"synchronization cliff, {crossing}"


def _complaint(outcome: Outcome, best: Outcome) -> str:
    own, others = shares(outcome), shares(best)
    complaints = []
    if outcome.kv_capacity_tokens < 0.9 * best.kv_capacity_tokens and _capacity_bound(outcome):
        complaints.append(
            f"capacity cliff, room for {_tokens(outcome.kv_capacity_tokens)} tokens of KV where the best has "
            f"{_tokens(best.kv_capacity_tokens)}{_preempted(outcome)}"
        )
    waiting, usual = (sum(each[term] for term in SYNCHRONIZATION) for each in (own, others))
    if waiting > usual + NOTABLE:
        complaints.append(f"synchronization cliff, {waiting:.0%} of the time between ranks, the best's {usual:.0%}")
    for term, words in (("idle", "idle"), ("host", "with the host"), ("weights", "reading weights"),
                        ("launch", "starting kernels")):  # fmt: skip
        if own[term] > others[term] + NOTABLE:
            complaints.append(f"{own[term]:.0%} of the time {words}, the best's {others[term]:.0%}")
    return "; ".join(complaints) or f"much like the best: {_account(outcome)}"


def _account(outcome: Outcome) -> str:
    largest = sorted(shares(outcome).items(), key=lambda item: -item[1])[:2]
    words = " and ".join(f"{share:.0%} {TERMS[term].split(':')[0]}" for term, share in largest)
    return f"room for {_tokens(outcome.kv_capacity_tokens)} tokens of KV{_preempted(outcome)}; {words}"


def _preempted(outcome: Outcome) -> str:
    if not outcome.preemptions:
        return ", nothing preempted"
    return f", {outcome.preemptions} preemptions, {_tokens(outcome.recomputed_tokens)} tokens computed again"


def _capacity_bound(outcome: Outcome) -> bool:
    """Whether requests waited for KV: preempted, or all of them need more than there is."""
    needed = sum(log.output_length for log in outcome.logs) / 2
    return outcome.preemptions > 0 or needed > outcome.kv_capacity_tokens


def _tokens(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 10**6 else f"{count / 1e3:.0f} k"
