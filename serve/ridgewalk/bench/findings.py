"""A report in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ridgewalk.bench.figures import count, milliseconds, percent
from ridgewalk.bench.report import Client, Point, Service

THROTTLED_SHARE = 0.1
"""A point is over the capacity cliff from so much time throttled on, or from the first preemption."""


CACHED_SHARE = 0.2
"""Prompts are written so that they share no prefix: more hits than this need an explanation."""


FOREIGN_SHARE = 0.02
"""The window is the load's alone, so both sides count the same tokens, but for those of requests that were moved."""


LATE_MS, LATE_SHARE = 50.0, 0.5
"""Clients are late when their mean time to first token is over the ingress's by more than the larger of these."""


def is_over_cliff(point: Point) -> bool:
    """KV capacity limits this load."""
    service = point.service
    return service is not None and (service.num_preemptions > 0 or service.throttled_share >= THROTTLED_SHARE)


def find_cliff(points: Sequence[Point]) -> int | None:
    """Index of the first point over the capacity cliff, in the order of load; None when all are on the safe side."""
    return next((index for index, point in enumerate(points) if is_over_cliff(point)), None)


def findings(points: Sequence[Point], *, is_ridgewalk: bool, missing: str | None = None) -> list[str]:
    """Sentences about a run, the most important first.

    Args:
        points: at least one, in the order of load.
        is_ridgewalk: the server has metrics of ours.
        missing: says which loads have no point, and why.
    """
    said = _about_sweep(points) if len(points) > 1 else _about_point(points[0])
    if missing is not None:
        said.append(missing)
    if not is_ridgewalk:
        said.append("The server exports no Ridgewalk metrics: the report has the clients' figures only.")
    said += _warnings(points, is_ridgewalk)
    return said


def _about_point(point: Point) -> list[str]:
    said = [] if point.service is None else ["The " + _kv(point.service), *_synchronization(point.service)]
    client = point.client
    if client.good_share is not None and client.good_requests_per_s is not None:
        said.append(
            f"{percent(client.good_share)} of the requests kept the SLO: a goodput of "
            f"{count(client.good_requests_per_s)} requests/s."
        )
    said.append(f"{_rate(client)}, first token after {_ttft(client)} (p99).")
    return said


def _about_sweep(points: Sequence[Point]) -> list[str]:
    said = []
    cliff = find_cliff(points)
    best = max(points, key=lambda point: point.client.output_tokens_per_s)
    if cliff is not None:
        point = points[cliff]
        where = f"is passed already at {point.label}" if cliff == 0 else (
            f"lies between {points[cliff - 1].label} and {_number(point)}"
        )  # fmt: skip
        said.append(f"The capacity cliff {where}. {_kv_at(point)}")
        last = points[-1]
        if last is not point:
            said.append(_kv_at(last))
        if cliff > 0:
            said.append(_price(points[cliff - 1], last))
    elif any(point.service is not None for point in points):
        seen = [p.service.kv_usage_max for p in points if p.service is not None and p.service.kv_usage_max is not None]
        used = f"at most {percent(max(seen))} of a KV cache was used" if seen else "nothing was preempted"
        said.append(f"No load reached the capacity cliff: {used}.")
    said.append(f"The highest throughput, {_rate(best.client)}, was at {best.label}.")
    if best.client.good_requests_per_s is not None:
        good = max(points, key=lambda point: point.client.good_requests_per_s or 0.0)
        said.append(
            f"The highest goodput, {count(good.client.good_requests_per_s or 0.0)} requests/s, was at {good.label}: "
            f"{percent(good.client.good_share or 0.0)} of the requests kept the SLO."
        )
    return said


def _kv(service: Service) -> str:
    """A sentence without its article."""
    if service.kv_usage_max is None:
        unseen = "load was too short to see how full the KV cache was: no complete scrape of /metrics fell within it"
        if not service.num_preemptions:
            return f"{unseen}; nothing was preempted."
        return f"{unseen}; {_preemptions(service)}."
    full = service.kv_full_share or 0.0
    if not service.num_preemptions and not full:
        return (
            f"KV cache was never full: at most {percent(service.kv_usage_max)} of its blocks were used where it was "
            "fullest, nothing was preempted."
        )
    if not service.num_preemptions:
        return (
            f"KV cache was full for {percent(full)} of the run, nothing was preempted; work waited for KV "
            f"{percent(service.throttled_share)} of the time."
        )
    when = f"for {percent(full)} of the run" if full else "for moments between two samples"
    return f"KV cache was full {when}; {_preemptions(service)}."


def _preemptions(service: Service) -> str:
    recomputed = percent(service.recompute_tax or 0.0)
    return f"{count(service.num_preemptions)} preemptions recomputed {recomputed} of the tokens"


def _kv_at(point: Point) -> str:
    if point.service is None:
        return ""
    return f"At {point.label} the {_kv(point.service)}"


def _price(before: Point, after: Point) -> str:
    """What the way over the cliff costs: throughput and time to first token."""
    sentence = (
        f"From {before.label} to {_number(after)} throughput went from {_rate(before.client)} to {_rate(after.client)}"
    )
    if before.client.output_tokens_per_s:
        sentence += f" ({after.client.output_tokens_per_s / before.client.output_tokens_per_s:.2g} times)"
    if before.client.ttft_ms is not None and after.client.ttft_ms is not None and before.client.ttft_ms.p99:
        slower = after.client.ttft_ms.p99 / before.client.ttft_ms.p99
        sentence += f", the wait for the first token (p99) from {_ttft(before.client)} to {_ttft(after.client)} "
        sentence += f"({slower:.2g} times)"
    return sentence + "."


def _synchronization(service: Service) -> list[str]:
    if not service.collective_share:
        return []
    return [
        f"Ranks spent {percent(service.collective_share)} of their step time in collectives, "
        f"{percent(service.collective_wait_share or 0.0)} waiting for the rank that came last."
    ]


def _warnings(points: Sequence[Point], is_ridgewalk: bool) -> list[str]:
    """What makes the figures less than they seem, each said once with the loads that it is true of."""
    said = []

    def where(affected: Sequence[Point]) -> str:
        return "" if len(points) == 1 else f" at {', '.join([affected[0].label, *map(_number, affected[1:])])}"

    if failing := [point for point in points if point.client.num_failed]:
        errors: Counter[str] = Counter()
        for point in failing:
            errors.update(point.client.errors)
        failed = sum(point.client.num_failed for point in failing)
        subject = "1 request" if failed == 1 else f"{failed} requests"
        said.append(f"{subject} failed{where(failing)}, most with: {errors.most_common(1)[0][0]}")
    if wrong := [point for point in points if point.client.num_wrong_length]:
        said.append(f"Some outputs{where(wrong)} had another length than asked: the load was not the one stated.")
    if cached := [point for point in points if _cached_share(point) > CACHED_SHARE]:
        said.append(
            f"Over {percent(CACHED_SHARE)} of the prompt tokens came from the prefix cache{where(cached)}: were the "
            "same prompts asked before? Another --seed asks new ones."
        )
    if shared := [point for point in points if not point.client.num_failed and _foreign_share(point) > FOREIGN_SHARE]:
        said.append(
            f"The service generated more tokens than these clients got{where(shared)}: was it used by others meanwhile?"
        )
    if late := [point for point in points if _is_late(point)]:
        said.append(
            f"Clients saw first tokens much later than the service sent them{where(late)}: between them are the "
            "network and the client itself, which may lack CPU."
        )
    if unread := [point for point in points if point.service is not None and point.service.num_scrapes_failed]:
        said.append(f"Some scrapes of /metrics got no answer{where(unread)}.")
    if partial := [point for point in points if point.service is not None and point.service.num_scrapes_incomplete]:
        said.append(
            f"Some scrapes of /metrics lacked a replica or an ingress{where(partial)} and are left out: did one end or "
            "start anew, or is it too busy to answer?"
        )
    if unknown := [point for point in points if is_ridgewalk and point.service is None]:
        said.append(
            f"What the service measured{where(unknown)} is not known: before the load or after it no scrape of "
            "/metrics had every replica and ingress."
        )
    if len(points) > 1 and (
        unseen := [point for point in points if point.service is not None and point.service.kv_usage_max is None]
    ):
        said.append(
            f"No complete scrape of /metrics fell within the load{where(unseen)}: how full the KV cache was there is "
            "not known. More --requests take longer."
        )
    return said


def _cached_share(point: Point) -> float:
    return 0.0 if point.service is None else point.service.prefix_cache_hit_rate or 0.0


def _foreign_share(point: Point) -> float:
    """Of the tokens that the service generated, those that none of our clients got."""
    if point.service is None or not point.service.generation_tokens:
        return 0.0
    return 1.0 - sum(point.client.requests.output_tokens) / point.service.generation_tokens


def _is_late(point: Point) -> bool:
    """More of the time to first token passed between service and client than a network explains."""
    if point.service is None or point.service.ttft_mean_ms is None or point.client.ttft_ms is None:
        return False
    between = point.client.ttft_ms.mean - point.service.ttft_mean_ms
    return between > max(LATE_MS, LATE_SHARE * point.service.ttft_mean_ms)


def _rate(client: Client) -> str:
    return f"{client.output_tokens_per_s:,.0f} tokens/s"


def _ttft(client: Client) -> str:
    return "unknown" if client.ttft_ms is None else milliseconds(client.ttft_ms.p99)


def _number(point: Point) -> str:
    return str(point.concurrency) if point.concurrency is not None else point.label
