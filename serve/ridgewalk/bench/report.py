"""The report as data: what `report.json` holds, and everything that the HTML shows.

Times are seconds since the first request of the point was sent, unless a name says otherwise. A share is 0 to 1.
``None``: not measured, or it cannot be known.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ridgewalk.config import ConfigError

SCHEMA_VERSION = 1
"""Grows when a field changes its meaning or goes; new fields with a default do not change it."""


class Distribution(msgspec.Struct, frozen=True):
    """Of one figure over the requests that succeeded; nearest-rank percentiles."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Slo(msgspec.Struct, frozen=True):
    """What a good request keeps; no limit where None."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    e2e_s: float | None = None


class Requests(msgspec.Struct, frozen=True):
    """The requests that succeeded, column by column, in the order they were sent."""

    start_s: list[float] = []
    ttft_ms: list[float] = []
    itl_ms: list[float | None] = []  # None: one token only, or all came at once
    longest_gap_ms: list[float | None] = []  # between two chunks of the stream: a preempted request shows here
    e2e_s: list[float] = []
    input_tokens: list[int] = []  # as the server counts them
    output_tokens: list[int] = []


class Client(msgspec.Struct, frozen=True):
    """What clients saw, by aiperf's records."""

    duration_s: float  # from the first request sent to the last reply ended
    num_requests: int  # that succeeded
    num_failed: int
    errors: dict[str, int]  # message -> requests
    requests_per_s: float
    output_tokens_per_s: float
    input_tokens_per_s: float
    ttft_ms: Distribution | None
    itl_ms: Distribution | None  # of the requests' means
    longest_gap_ms: Distribution | None
    e2e_s: Distribution | None
    input_tokens: Distribution | None
    output_tokens: Distribution | None
    num_wrong_length: int | None  # requests of more or fewer output tokens than asked for; None if not forced
    good_requests_per_s: float | None  # goodput; None without an SLO
    good_share: float | None  # of all requests, failed ones included
    requests: Requests


class Replica(msgspec.Struct, frozen=True):
    """One engine replica over the window."""

    name: str  # placement/replica
    kv_usage_mean: float | None  # over the samples, as all gauges here: None when the load was too short for any
    kv_usage_max: float | None  # of the attention group that was the fullest
    kv_full_share: float | None  # of the samples, with an attention group over FULL
    running_max: float | None
    waiting_max: float | None
    num_preemptions: float
    recomputed_tokens: float
    throttled_s: float


class Series(msgspec.Struct, frozen=True):
    """Samples of the service about once a second; the lists within `kv_usage` ... are by replica.

    Samples that lack a replica or an ingress are left out.
    """

    time_s: list[float] = []
    replicas: list[str] = []
    kv_usage: list[list[float | None]] = []  # mean over a replica's attention groups
    running: list[list[float | None]] = []
    waiting: list[list[float | None]] = []
    preemptions: list[float] = []  # since the window's start, all replicas
    generation_tokens_per_s: list[float] = []  # since the sample before
    stranded: list[float | None] = []
    kv_fullest: list[list[float | None]] = []  # of the attention group that is the fullest


class Service(msgspec.Struct, frozen=True):
    """What the service measured over the window of the client's load, from `/metrics`."""

    window_s: float  # between the scrapes around the load: the counters' growth is over it
    num_samples: int  # scrapes within the load, of which gauges are taken
    num_scrapes_failed: int  # that got no answer
    replicas: list[Replica]
    num_ranks: int
    kv_usage_mean: float | None
    kv_usage_max: float | None  # of the attention group that was the fullest
    kv_full_share: float | None  # of samples with an attention group over FULL
    internal_fragmentation: float | None  # mean over the samples with running sequences
    stranded_max: float | None
    weight_replication_bytes: float | None
    num_preemptions: float
    preemptions_per_request: float | None
    recomputed_tokens: float
    recompute_tax: float | None  # recomputed tokens / all computed
    throttled_s: float
    throttled_share: float  # of the client's duration, mean over replicas
    capacity_trap_share: float | None  # of samples
    running_mean: float | None  # sequences, all replicas
    waiting_mean: float | None
    queue_time_mean_s: float | None
    prefix_cache_hit_rate: float | None
    generation_tokens: float
    tokens_per_step: float | None
    ttft_mean_ms: float | None  # as the ingress saw it
    itl_mean_ms: float | None
    collective_share: float | None  # of step time, on the sampled steps, over all ranks; None with one rank
    collective_wait_share: float | None  # of step time
    collective_transfer_share: float | None
    step_share: dict[str, float]  # phase -> share of step time
    bubble_share: float | None  # of the load's duration, mean over ranks; None with one stage
    expert_imbalance_max: float | None  # worst layer
    series: Series
    num_scrapes_incomplete: int = 0  # left out: a replica of the model or an ingress did not answer them


class Point(msgspec.Struct, frozen=True):
    """One load."""

    label: str  # "concurrency 16", "2 requests/s", "as in the trace"
    concurrency: int | None
    rate: float | None
    client: Client
    service: Service | None  # None: no Ridgewalk, or no complete scrape before or after the load


class Target(msgspec.Struct, frozen=True):
    """What was under load."""

    url: str
    model: str
    placement: str | None
    version: str | None
    is_ridgewalk: bool
    max_model_len: int | None


class Workload(msgspec.Struct, frozen=True):
    """What was asked."""

    name: str  # of the profile, or of the trace's file
    about: str
    scale: float
    seed: int
    num_requests: int  # of each point
    input_length: Distribution  # asked for
    output_length: Distribution
    lengths_forced: bool  # end of sequence ignored, so that every output has the length asked for


class Report(msgspec.Struct, frozen=True):
    """One run of `ridgewalk bench`."""

    schema_version: int
    created: str  # ISO 8601, UTC
    ridgewalk_version: str
    aiperf_version: str
    target: Target
    workload: Workload
    slo: Slo
    points: list[Point]
    findings: list[str]  # sentences, the most important first


def write_report(report: Report, path: Path) -> None:
    """Write the JSON form."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def read_report(path: Path) -> Report:
    """Read a JSON form. Raises ConfigError when it is not one that this version understands, or has no load."""
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"--compare: {path} has schema version {version}, and this version reads {SCHEMA_VERSION}; run the "
                "load again"
            )
        report = msgspec.json.decode(data, type=Report)
    except OSError as error:
        raise ConfigError(f"--compare: {path} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"--compare: {path} is not a report.json of `ridgewalk bench`: {error}") from None
    if not report.points:
        raise ConfigError(f"--compare: {path} is a report without any load; run the load again")
    return report


class _Versioned(msgspec.Struct):
    schema_version: int
