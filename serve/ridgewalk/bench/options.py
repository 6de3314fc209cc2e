"""What a user asked `ridgewalk bench` for, checked before anything is installed or sent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ridgewalk.bench.aiperf import Load
from ridgewalk.bench.profiles import PROFILES
from ridgewalk.bench.report import Slo
from ridgewalk.bench.trace_file import read_trace
from ridgewalk.bench.workload import RequestShape, sample_requests, scaled
from ridgewalk.config import ConfigError

DEFAULT_REQUESTS = 100


@dataclass(frozen=True)
class Work:
    """What is asked at every load."""

    name: str
    about: str
    scale: float
    seed: int
    requests: tuple[RequestShape, ...]
    force_lengths: bool


def parse_loads(concurrency: str | None, rate: float | None, has_times: bool) -> tuple[Load, ...]:
    """The loads of a run: a sweep by concurrency in rising order, one rate, or a trace's own times.

    Raises:
        ConfigError: both or neither were given, or no positive number.
    """
    if concurrency is not None and rate is not None:
        raise ConfigError("--rate: give either --rate (open loop) or --concurrency (closed loop), not both")
    if rate is not None:
        if not rate > 0 or rate == float("inf"):
            raise ConfigError(f"--rate: {rate:g} is not a number of requests per second over 0")
        return (Load(rate=rate),)
    if concurrency is None:
        if has_times:
            return (Load(),)
        raise ConfigError(
            "--concurrency: say how much to load, with --concurrency 16, --concurrency 4,16,64 or --rate 2"
        )
    numbers = concurrency.split(",")
    if not all(re.fullmatch(r"\s*[1-9]\d*\s*", number) for number in numbers):
        raise ConfigError(f"--concurrency: {concurrency!r} is not a number like 16, nor several like 4,16,64")
    return tuple(Load(concurrency=number) for number in sorted({int(number) for number in numbers}))


def parse_duration_ms(flag: str, text: str | None) -> float | None:
    """Milliseconds of ``500ms`` or ``2.5s``. Raises ConfigError for anything else: a bare number could be either."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"{flag}: {text!r} is not a duration; write it with its unit, as 500ms or 2.5s")
    return float(match[1]) * (1.0 if match[2] == "ms" else 1e3)


def parse_slo(ttft: str | None, itl: str | None, e2e: str | None) -> Slo:
    """The limits stated. Raises ConfigError naming the flag."""
    end_to_end = parse_duration_ms("--slo-e2e", e2e)
    return Slo(
        ttft_ms=parse_duration_ms("--slo-ttft", ttft),
        itl_ms=parse_duration_ms("--slo-itl", itl),
        e2e_s=None if end_to_end is None else end_to_end / 1e3,
    )


def choose_work(
    profile: str | None, trace: Path | None, count: int | None, scale: float, seed: int, force_lengths: bool
) -> Work:
    """The requests of a profile (default ``reasoning``) or a trace, at ``scale``.

    Raises:
        ConfigError: no such profile, both given, a broken trace, or a number out of range.
    """
    if not 0 < scale < float("inf"):
        raise ConfigError(f"--scale: {scale:g} is not over 0; 0.05 asks for a twentieth of every length")
    if count is not None and count < 1:
        raise ConfigError(f"--requests: {count} is not a number of requests over 0")
    if trace is not None:
        if profile is not None:
            raise ConfigError("--trace: give either a profile or --trace, not both")
        requests = read_trace(trace, count)
        return Work(
            trace.name, f"a trace of {len(requests)} requests", scale, seed, scaled(requests, scale), force_lengths
        )
    name = profile or "reasoning"
    if name not in PROFILES:
        raise ConfigError(f"--profile: there is no profile {name!r}; there are {', '.join(PROFILES)}, and --trace FILE")
    sampled = sample_requests(PROFILES[name], count or DEFAULT_REQUESTS, seed)
    return Work(name, PROFILES[name].about, scale, seed, scaled(sampled, scale), force_lengths)


def check_enough(work: Work, loads: tuple[Load, ...]) -> None:
    """Raises ConfigError when a concurrency can never be reached."""
    most = max((load.concurrency or 0 for load in loads), default=0)
    if most > len(work.requests):
        raise ConfigError(
            f"--requests: {len(work.requests)} requests never keep {most} in flight; ask for some {4 * most} or more"
        )
