"""Reports and scrapes for tests, small and complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ridgewalk.bench.client_records import ClientRequest, client_figures
from ridgewalk.bench.findings import findings
from ridgewalk.bench.report import SCHEMA_VERSION, Distribution, Point, Report, Slo, Target, Workload
from ridgewalk.bench.service_window import TimedScrape, service_figures
from ridgewalk.bench.workload import RequestShape
from ridgewalk.load.scrape import Scrape

MODEL, PLACEMENT = "demo-dense", "DP2"
SLO = Slo(ttft_ms=100.0, itl_ms=20.0)


def timed_scrape(time: float, *replicas: Mapping[str, float], **others: float) -> TimedScrape:
    """A scrape of a service with so many replicas; keys are metrics without their prefix, ``{label=...}`` included."""
    samples = {}
    for number, values in enumerate(replicas):
        for name, value in values.items():
            name, _, rest = name.partition("{")
            labels = {"model_name": MODEL, "placement": PLACEMENT, "replica": str(number)}
            labels |= dict(pair.split("=") for pair in rest.rstrip("}").split(",") if pair)
            samples[(f"ridgewalk_{name}", frozenset(labels.items()))] = float(value)
    for name, value in others.items():
        samples[(f"ridgewalk_{name}", frozenset({("model_name", MODEL)}))] = float(value)
    return TimedScrape(time, Scrape(samples))


def requests(count: int, *, ttft_ms: float = 50.0, itl_ms: float = 10.0, tokens: int = 20) -> list[ClientRequest]:
    """Requests sent a tenth of a second apart, each a little slower than the one before."""
    return [
        ClientRequest(
            index=index,
            start=100.0 + index / 10,
            end=100.0 + index / 10 + (ttft_ms + index + itl_ms * (tokens - 1)) / 1e3,
            ttft_ms=ttft_ms + index,
            itl_ms=itl_ms,
            longest_gap_ms=3 * itl_ms,
            input_tokens=9,
            output_tokens=tokens,
        )
        for index in range(count)
    ]


def point(
    concurrency: int,
    *,
    preemptions: int = 0,
    usage: Sequence[float] = (0.5, 0.4),
    slower: float = 1.0,
    foreign: float = 0.0,
    seen: bool = True,
) -> Point:
    """A load of ten requests during which each replica used its share of ``usage``; not ``seen``: no scrape within."""
    sent = requests(10, ttft_ms=50.0 * slower, itl_ms=10.0 * slower)
    start, end = sent[0].start, max(request.end for request in sent)
    idle = {"kv_cache_usage_ratio": 0.0, "num_requests_running": 0.0, "num_preemptions_total": 3.0,
            "generation_tokens_total": 1000.0, "sequences_ended_total{finished_reason=length}": 7.0}  # fmt: skip
    replicas = [{**idle, "kv_cache_usage_ratio": value, "num_requests_running": 5.0} for value in usage]
    after = {**idle, "num_preemptions_total": 3.0 + preemptions, "recomputed_tokens_total": 10.0 * preemptions,
             "generation_tokens_total": 1000.0 + foreign + 200.0 / len(usage),
             "sequences_ended_total{finished_reason=length}": 12.0}  # fmt: skip
    samples = [timed_scrape(start - 0.5, *(idle for _ in usage)), timed_scrape(start + 0.5, *replicas)][: 1 + seen]
    samples.append(timed_scrape(end + 0.5, *(after for _ in usage)))
    shapes = [RequestShape(9, 20)] * len(sent)
    return Point(
        label=f"concurrency {concurrency}",
        concurrency=concurrency,
        rate=None,
        client=client_figures(sent, shapes, SLO),
        service=service_figures(samples, start, end, MODEL),
    )


def report(*points: Point, name: str = "reasoning", seed: int = 0, slo: Slo = SLO, is_ridgewalk: bool = True) -> Report:
    """A report of these points."""
    lengths = Distribution(mean=20.0, p50=20.0, p90=20.0, p99=20.0, max=20.0)
    return Report(
        schema_version=SCHEMA_VERSION,
        created="2026-01-02T03:04:05+00:00",
        ridgewalk_version="1",
        aiperf_version="1",
        target=Target("http://127.0.0.1:1", MODEL, PLACEMENT, "1", is_ridgewalk, 2048),
        workload=Workload(name, "for <tests>", 0.05, seed, 10, lengths, lengths, True),
        slo=slo,
        points=list(points),
        findings=findings(points, is_ridgewalk=is_ridgewalk),
    )


def without_service(a_point: Point) -> Point:
    """The same point of another server."""
    return msgspec.structs.replace(a_point, service=None)


def without_output(a_point: Point) -> Point:
    """The same point, had every request been answered with nothing."""
    return msgspec.structs.replace(a_point, client=msgspec.structs.replace(a_point.client, output_tokens_per_s=0.0))
