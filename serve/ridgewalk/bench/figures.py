"""The rows of the tables, as data: names, where in a report they are, how they are written, which way is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ridgewalk.bench.report import Client, Distribution, Point, Service

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """One row. ``value`` is None where a point has no such figure."""

    label: str
    value: Callable[[Point], float | None]
    write: Callable[[float], str]
    better: Better | None = None
    hint: str = ""


def milliseconds(value: float) -> str:
    """``34.2 ms``, ``1.25 s``."""
    return f"{value:.3g} ms" if value < 999.5 else seconds(value / 1e3)


def seconds(value: float) -> str:
    """``45.6 ms``, ``3.4 s``, ``1,204 s``."""
    if 0 < value < 0.9995:
        return milliseconds(value * 1e3)
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def percent(value: float) -> str:
    """A share as ``41 %``, ``0.3 %``."""
    return f"{value:.0%}".replace("%", " %") if value >= 0.0995 or value == 0 else f"{value * 100:.2g} %"


def count(value: float) -> str:
    """``1,024``, ``0.35``."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.3g}"


def mebibytes(value: float) -> str:
    """``12.3 MiB``."""
    return f"{value / 2**20:,.1f} MiB"


def _client(get: Callable[[Client], float | None]) -> Callable[[Point], float | None]:
    return lambda point: get(point.client)


def _service(get: Callable[[Service], float | None]) -> Callable[[Point], float | None]:
    return lambda point: None if point.service is None else get(point.service)


def _three(
    name: str, get: Callable[[Client], Distribution | None], write: Callable[[float], str], hint: str
) -> tuple[Figure, ...]:
    def at(part: str) -> Callable[[Point], float | None]:
        return lambda point: getattr(found, part) if (found := get(point.client)) is not None else None

    return tuple(
        Figure(f"{name}, {part}", at(part), write, "lower", hint if part == "p50" else "")
        for part in ("p50", "p90", "p99")
    )


CLIENT: tuple[Figure, ...] = (
    Figure("Output tokens/s", _client(lambda c: c.output_tokens_per_s), count, "higher"),
    Figure("Requests/s", _client(lambda c: c.requests_per_s), count, "higher"),
    Figure("Goodput, requests/s", _client(lambda c: c.good_requests_per_s), count, "higher",
           "requests that kept every SLO"),
    Figure("Requests within the SLO", _client(lambda c: c.good_share), percent, "higher",
           "failed ones count as missed"),
    *_three("Time to first token", lambda c: c.ttft_ms, milliseconds, "the chain of thought's tokens count"),
    *_three("Inter-token latency, means of requests", lambda c: c.itl_ms, milliseconds,
            "each request's mean, then percentiles over requests: single pauses are below"),
    *_three("Longest pause in a stream", lambda c: c.longest_gap_ms, milliseconds, "a preempted request shows here"),
    *_three("End to end", lambda c: c.e2e_s, seconds, "from sending a request to the end of its reply"),
    Figure("Requests answered", _client(lambda c: c.num_requests), count),
    Figure("Requests failed", _client(lambda c: c.num_failed), count, "lower"),
    Figure("Outputs of another length than asked", _client(lambda c: c.num_wrong_length), count, "lower"),
    Figure("Duration of the load", _client(lambda c: c.duration_s), seconds, "lower"),
)  # fmt: skip

SERVICE: tuple[Figure, ...] = (
    Figure("KV cache used, mean", _service(lambda s: s.kv_usage_mean), percent),
    Figure("KV cache used, at most", _service(lambda s: s.kv_usage_max), percent,
           hint="by the attention group that was the fullest"),
    Figure("Time with a full KV cache", _service(lambda s: s.kv_full_share), percent, "lower",
           "an attention group uses 95 % of its blocks or more"),
    Figure("Preemptions", _service(lambda s: s.num_preemptions), count, "lower"),
    Figure("Preemptions per request", _service(lambda s: s.preemptions_per_request), count, "lower"),
    Figure("Tokens recomputed", _service(lambda s: s.recomputed_tokens), count, "lower"),
    Figure("Recompute tax", _service(lambda s: s.recompute_tax), percent, "lower",
           "of all tokens computed, those computed again after a preemption"),
    Figure("Throttled for want of KV", _service(lambda s: s.throttled_share), percent, "lower",
           "of the time, work waited for KV blocks alone; mean over replicas"),
    Figure("Stranded KV, at most", _service(lambda s: s.stranded_max), percent, "lower",
           "free on one replica while another starves"),
    Figure("Internal fragmentation", _service(lambda s: s.internal_fragmentation), percent, "lower"),
    Figure("Weights held more than once", _service(lambda s: s.weight_replication_bytes), mebibytes, "lower"),
    Figure("Time in the capacity trap", _service(lambda s: s.capacity_trap_share), percent, "lower"),
    Figure("Sequences running, mean", _service(lambda s: s.running_mean), count),
    Figure("Sequences waiting, mean", _service(lambda s: s.waiting_mean), count, "lower"),
    Figure("Time in the queue, mean", _service(lambda s: s.queue_time_mean_s), seconds, "lower"),
    Figure("Tokens per step, mean", _service(lambda s: s.tokens_per_step), count, "higher"),
    Figure("Prefix cache hits", _service(lambda s: s.prefix_cache_hit_rate), percent, "higher", "of prompt tokens"),
    Figure("Time to first token, mean, at the ingress", _service(lambda s: s.ttft_mean_ms), milliseconds, "lower"),
    Figure("Inter-token latency, mean, at the ingress", _service(lambda s: s.itl_mean_ms), milliseconds, "lower"),
    Figure("Collectives, of step time", _service(lambda s: s.collective_share), percent, "lower",
           "on the sampled steps, over all ranks"),
    Figure("... waiting for the last rank", _service(lambda s: s.collective_wait_share), percent, "lower"),
    Figure("... transferring", _service(lambda s: s.collective_transfer_share), percent, "lower"),
    Figure("Pipeline bubbles", _service(lambda s: s.bubble_share), percent, "lower", "of a rank's time"),
    Figure("Busiest rank's experts / mean", _service(lambda s: s.expert_imbalance_max), count, "lower", "worst layer"),
)  # fmt: skip
