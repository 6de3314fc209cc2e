"""What clients see, as one ingress records it."""

from __future__ import annotations

import pytest

from ridgewalk.api.observer import RequestObserver
from ridgewalk.metrics.exposition import merge
from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.metrics.snapshot import decode
from tests.metrics.builders import samples, scrape, value


def text_of(*ingresses: IngressMetrics) -> bytes:
    return merge([decode(each.snapshot()) for each in ingresses])


def test_one_request_of_two_sequences() -> None:
    metrics = IngressMetrics("0", ["m"])
    observer: RequestObserver = metrics
    observer.on_request("m", "/v1/chat/completions")
    metrics.on_routed("m", "DP2", "least_loaded")
    observer.on_first_token("m", 0.3)
    observer.on_tokens("m", 0.012, 1)
    observer.on_tokens("m", 0.04, 4)  # four tokens of 10 ms
    observer.on_finish("m", "stop", 2.0, 30, 6)
    observer.on_finish("m", "length", 3.0, 0, 8)
    text = text_of(metrics)
    assert value(text, "requests_total", endpoint="chat_completions") == 1
    assert value(text, "routing_decisions_total", placement="DP2", reason="least_loaded") == 1
    assert value(text, "time_to_first_token_seconds_sum", model_name="m", ingress="0") == 0.3
    assert value(text, "time_to_first_token_seconds_bucket", le="0.25") == 0
    assert value(text, "time_to_first_token_seconds_bucket", le="0.5") == 1
    assert value(text, "inter_token_latency_seconds_count") == 5
    assert value(text, "inter_token_latency_seconds_sum") == pytest.approx(0.052)
    assert value(text, "inter_token_latency_seconds_bucket", le="0.01") == 4
    assert value(text, "e2e_request_latency_seconds_sum") == 5
    assert value(text, "e2e_request_latency_seconds_count") == 2
    assert value(text, "request_prompt_tokens_sum") == 30
    assert value(text, "request_prompt_tokens_count") == 1  # the second sequence shares the prompt
    assert value(text, "request_generation_tokens_sum") == 14
    assert value(text, "request_success_total", finished_reason="stop") == 1
    assert value(text, "request_success_total", finished_reason="length") == 1


def test_errors_by_status_and_without_a_model() -> None:
    metrics = IngressMetrics("0", ["m"])
    metrics.on_error("m", 499)
    metrics.on_error("", 401)
    metrics.on_error("", 401)
    text = text_of(metrics)
    assert value(text, "request_errors_total", model_name="m", status="499") == 1
    assert value(text, "request_errors_total", model_name="", status="401") == 2


def test_series_of_served_models_are_there_before_the_first_request() -> None:
    text = text_of(IngressMetrics("0", ["m"]))
    assert value(text, "request_success_total", model_name="m", finished_reason="stop") == 0
    assert value(text, "time_to_first_token_seconds_count", model_name="m") == 0


def test_traffic_cannot_grow_the_number_of_series() -> None:
    metrics = IngressMetrics("0", ["m"])
    for junk in range(300):
        metrics.on_request("m", f"/somewhere/{junk}")
        metrics.on_finish("m", f"reason {junk}", 1.0, 1, 1)
        metrics.on_error("m", 1000 + junk)
    text = text_of(metrics)
    assert value(text, "requests_total", endpoint="other") == 300
    assert value(text, "request_success_total", finished_reason="other") == 300
    assert value(text, "request_errors_total", status="other") == 300
    assert len(samples(text)) < 120


def test_a_restarted_ingress_resets_only_its_own_series() -> None:
    first, second = IngressMetrics("0", ["m"]), IngressMetrics("1", ["m"])
    for metrics in (first, second):
        metrics.on_finish("m", "stop", 1.0, 1, 1)
    restarted = IngressMetrics("1", ["m"])
    text = text_of(first, restarted)
    assert value(text, "request_success_total", ingress="0", finished_reason="stop") == 1
    assert value(text, "request_success_total", ingress="1", finished_reason="stop") == 0


def increase(scrapes: list[bytes], name: str, by: tuple[str, ...]) -> float:
    """As Prometheus computes it: by series, a fall being a reset to zero; summed. ``by``: labels that series keep."""
    last: dict[tuple[str, ...], float] = {}
    grown = 0.0
    for number, text in enumerate(scrapes):
        now: dict[tuple[str, ...], float] = {}
        for (sample, labels), amount in samples(text).items():
            if sample == "ridgewalk_" + name:
                key = tuple(dict(labels)[label] for label in by)
                now[key] = now.get(key, 0.0) + amount
        for key, amount in now.items():
            before = last.get(key, 0.0)
            grown += 0 if number == 0 else amount if amount < before else amount - before
        last = now
    return grown


def test_why_ingress_is_a_label_a_restart_does_not_count_what_others_counted_again() -> None:
    """100 requests at either ingress; the second restarts; one more request at each. That makes 2, not 102."""
    first, second = IngressMetrics("0", ["m"]), IngressMetrics("1", ["m"])
    for metrics in (first, second):
        for _ in range(100):
            metrics.on_request("m", "/v1/completions")
    scrapes = [text_of(first, second)]
    second = IngressMetrics("1", ["m"])
    for metrics in (first, second):
        metrics.on_request("m", "/v1/completions")
    scrapes.append(text_of(second, first))
    assert increase(scrapes, "requests_total", ("model_name", "ingress", "endpoint")) == 2
    assert increase(scrapes, "requests_total", ("model_name", "endpoint")) == 102  # were they summed


def test_a_service_mounted_below_a_prefix_has_the_same_endpoints() -> None:
    metrics = IngressMetrics("0")
    metrics.on_request("m", "/llm/v1/completions")
    assert value(scrape(encoded=[metrics.snapshot()]), "requests_total", endpoint="completions") == 1


def test_a_rank_that_serve_gives_anew_is_the_label_from_then_on() -> None:
    """Else two ingresses, or two replicas, could have one label and be summed."""
    rank = "1"
    metrics = IngressMetrics("1", ["m"], lambda: rank)
    metrics.on_scrape()
    rank = "0"
    text = merge([decode(metrics.snapshot())]).decode()
    assert 'ridgewalk_scrapes_total{ingress="0"} 1' in text
    assert 'ingress="1"' not in text
