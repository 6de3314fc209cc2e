"""The load that a running service has: lengths and rate of its requests, from its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from ridgewalk.bench.histogram_lengths import HistogramLengths
from ridgewalk.config import ConfigError
from ridgewalk.load.scrape import Scrape
from ridgewalk.metrics import catalogue

WINDOW_S = 10.0
"""In which arrivals are counted."""

Fetch = Callable[[], str]
"""Gives the text of `/metrics`; raises ConfigError."""


@dataclass(frozen=True)
class ServiceLoad:
    """What clients have asked of one model since the service started, and how often they ask now."""

    prompts: HistogramLengths
    outputs: HistogramLengths
    rate: float | None  # requests/s; None: not asked for


def measure_service(url: str, model: str, with_rate: bool) -> ServiceLoad:
    """Read the metrics of the service at ``url``; with its rate it takes `WINDOW_S`.

    ``model`` is the one that is planned for: a service of several models must know it by that name.

    Raises:
        ConfigError: nobody answers, it is no Ridgewalk, or nothing was asked; names the flag and the remedy.
    """
    base = url.rstrip("/").removesuffix("/v1").removesuffix("/metrics")
    with httpx.Client(timeout=30.0) as client:
        return read_load(base, model, lambda: _fetch(client, base), time.sleep if with_rate else None)


def read_load(url: str, model: str, fetch: Fetch, sleep: Callable[[float], None] | None) -> ServiceLoad:
    """As `measure_service`, from texts of metrics; without ``sleep`` no rate is taken."""
    before = _parse(url, fetch())
    name = _choose(before, model, url)
    after = before
    rate = None
    if sleep is not None:
        sleep(WINDOW_S)
        after = _parse(url, fetch())
        arrived = after.since(before).total(catalogue.REQUESTS.name, model_name=name)
        if not arrived:
            raise ConfigError(
                f"--workload: no request came to {url} within {WINDOW_S:.0f} s, so that its rate is unknown; state "
                "--rate, or --requests for so many at once"
            )
        rate = arrived / WINDOW_S
    prompts, outputs = (
        _lengths(after, spec, name, url)
        for spec in (catalogue.REQUEST_PROMPT_TOKENS, catalogue.REQUEST_GENERATION_TOKENS)
    )
    return ServiceLoad(prompts, outputs, rate)


def _fetch(client: httpx.Client, url: str) -> str:
    try:
        reply = client.get(f"{url}/metrics")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"--workload: no service answers at {url} ({error or type(error).__name__}); start one, or name a workload"
        ) from None
    if reply.status_code != 200:
        raise ConfigError(f"--workload: {url}/metrics answers {reply.status_code}; is this a Ridgewalk service?")
    return reply.text


def _parse(url: str, text: str) -> Scrape:
    try:
        scrape = Scrape.parse(text)
    except ValueError:
        raise ConfigError(f"--workload: {url}/metrics is not in the Prometheus text format") from None
    if not scrape.total(catalogue.BUILD_INFO.name):
        raise ConfigError(
            f"--workload: {url} is not a Ridgewalk service: its /metrics lacks {catalogue.BUILD_INFO.name}"
        )
    return scrape


def _choose(scrape: Scrape, model: str, url: str) -> str:
    """The model's name there."""
    served = scrape.values_of(f"{catalogue.REQUEST_GENERATION_TOKENS.name}_count", "model_name") - {""}
    if model in served:
        return model
    if len(served) == 1:
        return served.pop()
    if not served:
        raise ConfigError(
            f"--workload: {url} has no {catalogue.REQUEST_GENERATION_TOKENS.name} of any model: nothing has ended there"
        )
    raise ConfigError(
        f"--workload: {url} serves {', '.join(sorted(served))}; plan for one of them by that name, as {model!r} is none"
    )


def _lengths(scrape: Scrape, spec: catalogue.MetricSpec, model: str, url: str) -> HistogramLengths:
    buckets = f"{spec.name}_bucket"
    cumulative = {
        float(bound): scrape.total(buckets, model_name=model, le=bound)
        for bound in scrape.values_of(buckets, "le", model_name=model)
    }
    mean = scrape.mean(spec.name, model_name=model)
    if mean is None or not cumulative:
        raise ConfigError(
            f"--workload: {url} has observed no {spec.name} of {model} yet; ask again when requests have ended"
        )
    return HistogramLengths.of(cumulative, mean)
