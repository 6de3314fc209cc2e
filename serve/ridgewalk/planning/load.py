"""The load that placements are asked to serve: requests of a profile or a trace, and when they arrive."""

from __future__ import annotations

import random
from pathlib import Path

from ridgewalk.bench.profiles import PROFILES, read_profile
from ridgewalk.bench.trace_file import read_trace
from ridgewalk.bench.workload import RequestShape, sample_lengths, sample_requests
from ridgewalk.config import ConfigError
from ridgewalk.planning.simulator import Arrival

CLOSED_BATCH, OPEN_LOOP = 2000, 500
"""Requests, where nobody says how many."""


def make_load(
    workload: str, requests: int | None, rate: float | None, seed: int, model: str = ""
) -> tuple[Arrival, ...]:
    """A closed batch, all at once, or with ``rate`` requests a second as a Poisson process.

    The workload of a service (its URL) comes at the service's own rate if neither is stated. ``model`` is what is
    planned for: a service of several knows it by that name.

    Raises:
        ConfigError: no such workload, or a number out of range; names the flag.
    """
    if requests is not None and requests < 1:
        raise ConfigError(f"--requests: {requests} is not a number of requests over 0")
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"--rate: {rate:g} is not a number of requests per second over 0")
    count = requests or (CLOSED_BATCH if rate is None else OPEN_LOOP)
    if workload.startswith(("http://", "https://")):
        from ridgewalk.bench.service_load import measure_service  # an HTTP client, and the metrics

        measured = measure_service(workload, model, with_rate=requests is None and rate is None)
        rate = rate or measured.rate
        count = requests or OPEN_LOOP
        shapes = sample_lengths(measured.prompts, measured.outputs, count, random.Random(f"{workload}:{seed}"))
    else:
        shapes = _shapes(workload, requests, count, seed)
    times = random.Random(seed)
    now, arrivals = 0.0, []
    for shape in shapes:
        if rate is not None:
            now += times.expovariate(rate)
        arrivals.append(Arrival(now, shape.input_length, shape.output_length))
    return tuple(arrivals)


def _shapes(workload: str, requests: int | None, count: int, seed: int) -> tuple[RequestShape, ...]:
    if workload.endswith((".jsonl", ".json")):
        return read_trace(Path(workload), requests)
    if workload.endswith((".yaml", ".yml")):
        try:
            return sample_requests(read_profile(Path(workload).expanduser()), count, seed)
        except ConfigError as error:
            raise ConfigError(f"--workload: {error}") from None
    if workload not in PROFILES:
        raise ConfigError(
            f"--workload: there is no workload {workload!r}; there are {', '.join(PROFILES)}, and the path of a "
            "distribution (.yaml) or of a trace (.jsonl, a line as {'input_length': 90, 'output_length': 9}), and a "
            "service's URL"
        )
    return sample_requests(PROFILES[workload], count, seed)
