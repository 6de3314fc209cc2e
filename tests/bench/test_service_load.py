"""The load of a running service, from the text of its metrics."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from ridgewalk.bench.histogram_lengths import HistogramLengths
from ridgewalk.bench.service_load import WINDOW_S, ServiceLoad, read_load
from ridgewalk.config import ConfigError
from ridgewalk.metrics.catalogue import TOKEN_BUCKETS
from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.planning.load import make_load

BUILD = '# TYPE ridgewalk_build_info gauge\nridgewalk_build_info{version="1"} 1\n'


class Service:
    """Its metrics; each scrape of them may find more requests."""

    def __init__(self, *models: str) -> None:
        self.metrics = IngressMetrics("0", models)

    def serve(self, model: str, lengths: Iterable[tuple[int, int]]) -> None:
        for prompt, output in lengths:
            self.metrics.on_request(model, "/v1/completions")
            self.metrics.on_finish(model, "length", 1.0, prompt, output)

    def text(self) -> str:
        return BUILD + generate_latest(self.metrics.registry).decode()


def read(service: Service, model: str = "small", arriving: int = 0) -> ServiceLoad:
    def sleep(seconds: float) -> None:
        assert seconds == WINDOW_S
        service.serve("small", [(30, 300)] * arriving)

    return read_load("http://host:8000", model, service.text, sleep if arriving >= 0 else None)


def test_lengths_are_those_of_all_time_and_the_rate_is_of_now() -> None:
    service = Service("small")
    service.serve("small", [(30, 300)] * 75 + [(3000, 30)] * 20)
    load = read(service, arriving=5)
    assert load.rate == 5 / WINDOW_S
    prompts, outputs = load.prompts.sample(1000, random.Random(0)), load.outputs.sample(1000, random.Random(0))
    assert sum(20 < length <= 50 for length in prompts) == 800
    assert sum(2000 < length <= 5000 for length in prompts) == 200
    assert sum(prompts) / 1000 == pytest.approx(0.8 * 30 + 0.2 * 3000, rel=0.02)
    assert sum(outputs) / 1000 == pytest.approx(0.8 * 300 + 0.2 * 30, rel=0.02)


def test_of_several_models_the_one_that_is_planned_for_counts() -> None:
    service = Service("small", "other")
    service.serve("small", [(30, 300)] * 10)
    service.serve("other", [(900, 9)] * 10)
    assert read(service, arriving=-1).rate is None
    assert read(service, arriving=-1).outputs.mean == pytest.approx(300, rel=0.02)
    with pytest.raises(ConfigError, match=r"serves other, small; plan for one of them by that name, as 'qwen' is none"):
        read(service, model="qwen", arriving=-1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a" * 20 + " {", "is not in the Prometheus text format"),
        ("up 1\n", "is not a Ridgewalk service: its /metrics lacks ridgewalk_build_info"),
        (BUILD, "has no ridgewalk_request_generation_tokens of any model: nothing has ended there"),
        (Service("small").text(), "has observed no ridgewalk_request_prompt_tokens of small yet"),
    ],
)
def test_what_cannot_be_planned_from_is_a_sentence(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"--workload: http://host:8000.*{says}"):
        read_load("http://host:8000", "small", lambda: text, None)


def test_the_metrics_of_a_service_are_fetched_and_planned_with() -> None:
    service = Service("small")
    service.serve("small", [(30, 300)] * 10)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(service.text().encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        arrivals = make_load(url, 20, None, 0, "small")
        with pytest.raises(ConfigError, match="/nowhere/metrics answers 404; is this a Ridgewalk service"):
            make_load(url.replace("/v1", "/nowhere"), 20, None, 0, "small")
        server.shutdown()
    assert len(arrivals) == 20
    assert {arrival.time_s for arrival in arrivals} == {0.0}
    assert all(20 < arrival.prompt_length <= 50 and 200 < arrival.output_length <= 500 for arrival in arrivals)


def test_without_arrivals_the_rate_is_asked_for() -> None:
    service = Service("small")
    service.serve("small", [(30, 300)])
    with pytest.raises(
        ConfigError, match=r"no request came to http://host:8000 within 10 s.*state --rate, or --requests"
    ):
        read(service, arriving=0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=60))
def test_a_histogram_gives_back_its_buckets_and_nearly_its_mean(lengths: list[int]) -> None:
    cumulative = {bound: float(sum(length <= bound for length in lengths)) for bound in TOKEN_BUCKETS}
    found = HistogramLengths.of({**cumulative, float("inf"): float(len(lengths))}, sum(lengths) / len(lengths))
    sample = found.sample(len(lengths), random.Random(0))
    for bound in TOKEN_BUCKETS:
        assert abs(sum(length <= bound for length in sample) - cumulative[bound]) <= 1 + len(lengths) * 0.01
    assert min(sample) >= 1
