"""The service's side: scrapes of `/metrics` about once a second, and what they say about the window of a load."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import httpx

from ridgewalk.bench.report import Replica, Series, Service
from ridgewalk.bench.statistics import mean, ratio, rounded
from ridgewalk.load.scrape import Scrape, growth
from ridgewalk.metrics import catalogue as names

FULL = 0.95
"""An attention group's KV cache counts as full from this share of its blocks: the rest is less than what running
sequences need to grow."""

SAMPLE_EVERY_S = 1.0
SETTLED_S = 0.5
"""A replica publishes its counters every 0.1 s: until then its last tokens are with the client and not yet counted."""

MOST_SAMPLES = 600  # of the series in a report; longer runs are thinned out
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class TimedScrape:
    """A scrape, and when it was asked for by the wall clock."""

    time: float
    scrape: Scrape


class ServiceSampler:
    """While entered, scrapes a service: at once, every second, and a last time at the end."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.samples: list[TimedScrape] = []
        self.num_failed = 0
        self._url, self._headers = url, headers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> ServiceSampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(timeout=_TIMEOUT_S, headers=self._headers) as client:
            while not self._ended.is_set():
                self._scrape(client)
                self._ended.wait(SAMPLE_EVERY_S)
            time.sleep(SETTLED_S)
            self._scrape(client)

    def _scrape(self, client: httpx.Client) -> None:
        asked = time.time()
        try:
            reply = client.get(f"{self._url}/metrics")
            reply.raise_for_status()
            self.samples.append(TimedScrape(asked, _without_buckets(Scrape.parse(reply.text))))
        except (httpx.HTTPError, ValueError):
            self.num_failed += 1


def _without_buckets(scrape: Scrape) -> Scrape:
    """Nothing here reads buckets, and they are most of a scrape."""
    return Scrape({key: value for key, value in scrape.samples.items() if not key[0].endswith("_bucket")})


def service_figures(
    samples: Sequence[TimedScrape], start: float, end: float, model: str, num_failed: int = 0
) -> Service | None:
    """What the service measured from ``start`` to ``end``.

    Counters are taken between the last scrape before the window and the first `SETTLED_S` after it: the service is idle
    outside of the window, so that they have grown by the load alone; those within tell of counters that started anew.
    Gauges are taken of the scrapes within. Scrapes that lack a process are left out: its counters would seem to begin
    at 0.

    Args:
        samples: in the order of time.
        start: when the first request was sent, by the clock of ``samples``.
        end: when the last reply ended.
        model: the one under load; others of the service do not count.
        num_failed: scrapes that got no answer.

    Returns:
        None when no complete scrape came before the window or none `SETTLED_S` after it.
    """
    asked = len(samples)
    samples = [sample for sample in samples if _is_complete(sample.scrape, model)]
    before = [sample for sample in samples if sample.time <= start]
    after = [sample for sample in samples if sample.time >= end + SETTLED_S]
    if not before or not after:
        return None
    inside = [sample for sample in samples if start < sample.time < end]
    window = [before[-1], *inside, after[0]]
    grown = _Growth(window, model)
    found = _replicas_of(window, model)
    gauges = _Gauges(inside, found, model)
    replicas = _replicas(grown, gauges, found)
    step, ranks = grown.total(names.STEP_SECONDS, "_sum"), grown.num_ranks
    preemptions, recomputed = grown.total(names.NUM_PREEMPTIONS), grown.total(names.RECOMPUTED_TOKENS)
    throttled, generated = grown.total(names.KV_THROTTLED_SECONDS), grown.total(names.GENERATION_TOKENS)
    ended = grown.total(names.SEQUENCES_ENDED)
    prompt, hits = grown.total(names.PROMPT_TOKENS), grown.total(names.PREFIX_CACHE_HITS)
    fullest = [max(row) for row in gauges.fullest_rows()]
    wait = ratio(grown.total(names.COLLECTIVE_SECONDS, "_sum", phase="wait"), step)
    transfer = ratio(grown.total(names.COLLECTIVE_SECONDS, "_sum", phase="transfer"), step)
    has_stages = any(value != "1" for value in after[0].scrape.values_of(
        names.PLACEMENT_INFO.name, "pipeline_parallel_size", model_name=model))  # fmt: skip
    return Service(
        window_s=rounded(grown.seconds),
        num_samples=len(inside),
        num_scrapes_failed=num_failed,
        num_scrapes_incomplete=asked - len(samples),
        replicas=replicas,
        num_ranks=ranks,
        kv_usage_mean=_maybe(mean([value for row in gauges.rows(names.KV_CACHE_USAGE) for value in row])),
        kv_usage_max=_maybe(max(fullest, default=None)),
        kv_full_share=_maybe(mean([float(value >= FULL) for value in fullest])),
        internal_fragmentation=_maybe(mean(gauges.fragmentation())),
        stranded_max=_maybe(max(gauges.known(names.KV_STRANDED), default=None)),
        weight_replication_bytes=after[0].scrape.get(names.KV_WEIGHT_REPLICATION.name, model_name=model),
        num_preemptions=preemptions,
        preemptions_per_request=_maybe(ratio(preemptions, ended)),
        recomputed_tokens=recomputed,
        recompute_tax=_maybe(ratio(recomputed, recomputed + prompt + generated - hits)),
        throttled_s=rounded(throttled),
        throttled_share=rounded(min(1.0, throttled / (end - start) / max(1, len(replicas)))),
        capacity_trap_share=_maybe(mean(gauges.known(names.CAPACITY_TRAP))),
        running_mean=_maybe(mean([sum(row) for row in gauges.rows(names.NUM_REQUESTS_RUNNING)])),
        waiting_mean=_maybe(mean([sum(row) for row in gauges.rows(names.NUM_REQUESTS_WAITING)])),
        queue_time_mean_s=grown.mean(names.REQUEST_QUEUE_TIME),
        prefix_cache_hit_rate=_maybe(ratio(hits, grown.total(names.PREFIX_CACHE_QUERIES))),
        generation_tokens=generated,
        tokens_per_step=_maybe(ratio(generated, grown.total(names.ENGINE_STEPS))),
        ttft_mean_ms=_times(grown.mean(names.TIME_TO_FIRST_TOKEN), 1e3),
        itl_mean_ms=_times(grown.mean(names.INTER_TOKEN_LATENCY), 1e3),
        collective_share=None if wait is None or transfer is None or ranks < 2 else rounded(wait + transfer),
        collective_wait_share=_maybe(wait) if ranks > 1 else None,
        collective_transfer_share=_maybe(transfer) if ranks > 1 else None,
        step_share=grown.step_shares(step),
        bubble_share=_maybe(ratio(grown.total(names.PIPELINE_BUBBLE), (end - start) * ranks)) if has_stages else None,
        expert_imbalance_max=_maybe(max(gauges.known(names.EXPERT_LOAD_IMBALANCE, scope="worst"), default=None)),
        series=_series(window, found, start, model),
    )


def _is_complete(scrape: Scrape, model: str) -> bool:
    """Every replica of the model and every ingress answered."""
    return not scrape.total(names.SCRAPE_MISSING_REPLICAS.name, model_name=model) and not scrape.total(
        names.SCRAPE_MISSING_INGRESSES.name
    )


def _replicas_of(samples: Sequence[TimedScrape], model: str) -> list[tuple[str, str]]:
    """Placement and rank of each replica that is in any of ``samples``."""
    found = {
        (labels["placement"], labels["replica"])
        for sample in samples
        for labels in sample.scrape.labels_of(names.KV_CACHE_USAGE.name, model_name=model)
    }
    return sorted(found, key=lambda key: (key[0], len(key[1]), key[1]))


class _Growth:
    """What the counters of one model grew by from the first of some scrapes to the last."""

    def __init__(self, samples: Sequence[TimedScrape], model: str) -> None:
        before, after = samples[0], samples[-1]
        self.seconds = after.time - before.time
        *_, self._scrape = growth(sample.scrape for sample in samples)
        self._model = model
        ranks = {
            (labels["placement"], labels["replica"], labels["rank"])
            for labels in after.scrape.labels_of(f"{names.STEP_SECONDS.name}_sum", model_name=model)
        }
        self.num_ranks = len(ranks)

    def total(self, spec: names.MetricSpec, suffix: str = "", **labels: str) -> float:
        return self._scrape.total(spec.name + suffix, model_name=self._model, **labels)

    def mean(self, spec: names.MetricSpec) -> float | None:
        return _maybe(self._scrape.mean(spec.name, model_name=self._model))

    def step_shares(self, step: float) -> dict[str, float]:
        phases = self._scrape.values_of(f"{names.STEP_SECONDS.name}_sum", "phase", model_name=self._model)
        return {phase: rounded(self.total(names.STEP_SECONDS, "_sum", phase=phase) / step) for phase in sorted(phases)
                if step}  # fmt: skip


class _Gauges:
    """The gauges of one model's replicas in a row of scrapes; None where a scrape lacks the replica."""

    def __init__(self, samples: Sequence[TimedScrape], replicas: Sequence[tuple[str, str]], model: str) -> None:
        self._samples, self._replicas, self._model = samples, replicas, model

    def of(self, spec: names.MetricSpec, placement: str, replica: str) -> list[float | None]:
        labels = {"model_name": self._model, "placement": placement, "replica": replica}
        return [sample.scrape.get(spec.name, **labels) for sample in self._samples]

    def fullest(self, placement: str, replica: str) -> list[float | None]:
        """KV usage of the attention group that is the fullest: the replica's own is the mean over them."""
        whole = self.of(names.KV_CACHE_USAGE, placement, replica)
        labels = {"model_name": self._model, "placement": placement, "replica": replica}
        return [
            usage if usage is None else max(_group_usages(sample.scrape, labels), default=usage)
            for usage, sample in zip(whole, self._samples, strict=True)
        ]

    def rows(self, spec: names.MetricSpec) -> list[list[float]]:
        """By scrape, then by replica that it has."""
        return _rows([self.of(spec, *key) for key in self._replicas])

    def fullest_rows(self) -> list[list[float]]:
        """`fullest` by scrape, then by replica that it has."""
        return _rows([self.fullest(*key) for key in self._replicas])

    def known(self, spec: names.MetricSpec, **labels: str) -> list[float]:
        """The largest value of each scrape that has one."""
        return _known([sample.scrape.get(spec.name, model_name=self._model, **labels) for sample in self._samples])

    def fragmentation(self) -> list[float]:
        return [
            fragmentation
            for key in self._replicas
            for fragmentation, running in zip(
                self.of(names.KV_INTERNAL_FRAGMENTATION, *key), self.of(names.NUM_REQUESTS_RUNNING, *key), strict=True
            )
            if running and fragmentation is not None
        ]


def _group_usages(scrape: Scrape, labels: dict[str, str]) -> list[float]:
    """Used KV blocks / all, of each attention group of a replica."""
    usages = []
    for group in scrape.values_of(names.KV_BLOCKS.name, "group", **labels):
        blocks = scrape.total(names.KV_BLOCKS.name, group=group, **labels)
        used = scrape.total(names.KV_BLOCKS.name, group=group, state="used", **labels)
        usages.append(used / blocks if blocks else 0.0)
    return usages


def _replicas(grown: _Growth, gauges: _Gauges, found: Sequence[tuple[str, str]]) -> list[Replica]:
    replicas = []
    for placement, replica in found:
        labels = {"placement": placement, "replica": replica}
        fullest = _known(gauges.fullest(placement, replica))
        running = _known(gauges.of(names.NUM_REQUESTS_RUNNING, placement, replica))
        waiting = _known(gauges.of(names.NUM_REQUESTS_WAITING, placement, replica))
        replicas.append(
            Replica(
                name=f"{placement}/{replica}",
                kv_usage_mean=_maybe(mean(_known(gauges.of(names.KV_CACHE_USAGE, placement, replica)))),
                kv_usage_max=_maybe(max(fullest, default=None)),
                kv_full_share=_maybe(mean([float(value >= FULL) for value in fullest])),
                running_max=max(running, default=None),
                waiting_max=max(waiting, default=None),
                num_preemptions=grown.total(names.NUM_PREEMPTIONS, **labels),
                recomputed_tokens=grown.total(names.RECOMPUTED_TOKENS, **labels),
                throttled_s=rounded(grown.total(names.KV_THROTTLED_SECONDS, **labels)),
            )
        )
    return replicas


def _series(samples: Sequence[TimedScrape], replicas: Sequence[tuple[str, str]], start: float, model: str) -> Series:
    every = -(-len(samples) // MOST_SAMPLES)
    so_far = [
        (scrape.total(names.NUM_PREEMPTIONS.name, model_name=model),
         scrape.total(names.GENERATION_TOKENS.name, model_name=model))
        for scrape in growth(sample.scrape for sample in samples)
    ][::every]  # fmt: skip
    preemptions, tokens = [each[0] for each in so_far], [each[1] for each in so_far]
    samples = samples[::every]
    gauges = _Gauges(samples, replicas, model)

    def by_replica(spec: names.MetricSpec) -> list[list[float | None]]:
        return [[_maybe(value) for value in gauges.of(spec, *key)] for key in replicas]

    times = [sample.time - start for sample in samples]
    rates = [rounded((tokens[i] - tokens[i - 1]) / max(1e-9, times[i] - times[i - 1])) for i in range(1, len(times))]
    return Series(
        time_s=[rounded(time) for time in times],
        replicas=[f"{placement}/{replica}" for placement, replica in replicas],
        kv_usage=by_replica(names.KV_CACHE_USAGE),
        kv_fullest=[[_maybe(value) for value in gauges.fullest(*key)] for key in replicas],
        running=by_replica(names.NUM_REQUESTS_RUNNING),
        waiting=by_replica(names.NUM_REQUESTS_WAITING),
        preemptions=preemptions,
        generation_tokens_per_s=[0.0, *rates],
        stranded=[_maybe(sample.scrape.get(names.KV_STRANDED.name, model_name=model)) for sample in samples],
    )


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _rows(columns: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """The known values of each scrape; scrapes without any are left out."""
    return [known for row in zip(*columns, strict=True) if (known := _known(row))]


def _maybe(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else rounded(value * factor)
