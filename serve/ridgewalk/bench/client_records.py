"""aiperf's records, one JSON object a request, as the client's side of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ridgewalk.bench.report import Client, Requests, Slo
from ridgewalk.bench.statistics import distribution, ratio, rounded
from ridgewalk.bench.workload import RequestShape

SESSION = "request-"
"""Begins the session ids that say which line of the input file a record is of."""


class RecordsError(RuntimeError):
    """aiperf wrote something else than expected."""


class _Metadata(msgspec.Struct):
    request_start_ns: int  # wall clock
    request_end_ns: int
    conversation_id: str  # the session_id of the request's line in the input file
    benchmark_phase: str = "profiling"


class _Value(msgspec.Struct):
    value: float | list[float] | None = None


class _Error(msgspec.Struct):
    message: str | None = None
    type: str | None = None
    code: int | None = None


class _Record(msgspec.Struct):
    metadata: _Metadata
    metrics: dict[str, _Value] = {}
    error: _Error | None = None

    def number(self, name: str) -> float | None:
        metric = self.metrics.get(name)
        return float(metric.value) if metric is not None and isinstance(metric.value, float | int) else None

    def numbers(self, name: str) -> list[float]:
        metric = self.metrics.get(name)
        return metric.value if metric is not None and isinstance(metric.value, list) else []


@dataclass(frozen=True)
class ClientRequest:
    """One request as its client saw it. Absolute times in seconds of the wall clock."""

    index: int  # of the shape that it was sent for
    start: float
    end: float
    ttft_ms: float | None = None
    itl_ms: float | None = None
    longest_gap_ms: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def e2e_s(self) -> float:
        """From sending it to the end of its reply."""
        return self.end - self.start

    def is_good(self, slo: Slo) -> bool:
        """It succeeded within every limit stated."""
        return self.error is None and all(
            limit is None or (seen is not None and seen <= limit)
            for limit, seen in (
                (slo.ttft_ms, self.ttft_ms),
                (slo.itl_ms, self.itl_ms if self.output_tokens > 1 else 0.0),
                (slo.e2e_s, self.e2e_s),
            )
        )


_decoder = msgspec.json.Decoder(_Record)


def read_records(path: Path) -> list[ClientRequest]:
    """The requests of a `profile_export.jsonl`, in the order they were sent.

    Raises:
        RecordsError: the file is not there or reads otherwise than that of the aiperf this was written for.
    """
    try:
        records = [_decoder.decode(line) for line in path.read_bytes().splitlines() if line.strip()]
        requests = [_request(record) for record in records if record.metadata.benchmark_phase == "profiling"]
    except OSError as error:
        raise RecordsError(f"aiperf left no records: {error.strerror}") from None
    except ValueError as error:  # msgspec's errors are
        raise RecordsError(f"aiperf's records cannot be read ({error}); is it the version named?") from None
    return sorted(requests, key=lambda request: request.start)


def client_figures(
    requests: Sequence[ClientRequest], shapes: Sequence[RequestShape], slo: Slo, *, forced: bool = True
) -> Client:
    """What all of the clients saw together.

    Args:
        requests: at least one, in the order they were sent.
        shapes: what was asked for.
        slo: what a good request keeps.
        forced: outputs were to be exactly as long as asked.
    """
    done = [request for request in requests if request.error is None]
    first = min(request.start for request in requests)
    duration = max(request.end for request in requests) - first
    gaps = [request.longest_gap_ms for request in done if request.longest_gap_ms is not None]
    inputs, outputs = [request.input_tokens for request in done], [request.output_tokens for request in done]
    wrong = sum(request.output_tokens != shapes[request.index].output_length for request in done)
    good = sum(request.is_good(slo) for request in requests) if slo != Slo() else None
    return Client(
        duration_s=rounded(duration),
        num_requests=len(done),
        num_failed=len(requests) - len(done),
        errors=dict(Counter(request.error for request in requests if request.error is not None).most_common(10)),
        requests_per_s=rounded(len(done) / duration),
        output_tokens_per_s=rounded(sum(outputs) / duration),
        input_tokens_per_s=rounded(sum(inputs) / duration),
        ttft_ms=distribution([request.ttft_ms for request in done if request.ttft_ms is not None]),
        itl_ms=distribution([request.itl_ms for request in done if request.itl_ms is not None]),
        longest_gap_ms=distribution(gaps),
        e2e_s=distribution([request.e2e_s for request in done]),
        input_tokens=distribution(inputs),
        output_tokens=distribution(outputs),
        num_wrong_length=wrong if forced else None,
        good_requests_per_s=None if good is None else rounded(good / duration),
        good_share=None if good is None else ratio(good, len(requests)),
        requests=_columns(done, first),
    )


def _columns(done: Sequence[ClientRequest], first: float) -> Requests:
    return Requests(
        start_s=[rounded(request.start - first) for request in done],
        ttft_ms=[rounded(request.ttft_ms or 0.0) for request in done],
        itl_ms=[_maybe(request.itl_ms) for request in done],
        longest_gap_ms=[_maybe(request.longest_gap_ms) for request in done],
        e2e_s=[rounded(request.e2e_s) for request in done],
        input_tokens=[request.input_tokens for request in done],
        output_tokens=[request.output_tokens for request in done],
    )


def _maybe(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def _request(record: _Record) -> ClientRequest:
    metadata = record.metadata
    index = int(metadata.conversation_id.removeprefix(SESSION))
    start, end = metadata.request_start_ns / 1e9, metadata.request_end_ns / 1e9
    if record.error is not None:
        return ClientRequest(index, start, end, error=_message(record.error))
    return ClientRequest(
        index=index,
        start=start,
        end=end,
        ttft_ms=record.number("time_to_first_token"),
        itl_ms=record.number("inter_token_latency"),
        longest_gap_ms=max(record.numbers("inter_chunk_latency"), default=None),
        input_tokens=int(record.number("usage_prompt_tokens") or 0),
        output_tokens=int(record.number("usage_completion_tokens") or 0),
    )


def _message(error: _Error) -> str:
    kind = None if error.type is not None and error.type in (error.message or "") else error.type
    text = " ".join(str(value) for value in (error.code, kind, error.message) if value is not None)
    return " ".join(text.split())[:300] or "failed without a message"
