"""Client records and scrapes become the figures of one window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ridgewalk.bench.client_records import RecordsError, client_figures, read_records
from ridgewalk.bench.report import Slo
from ridgewalk.bench.service_window import service_figures
from ridgewalk.bench.workload import RequestShape
from ridgewalk.load.scrape import Scrape
from tests.bench.builders import MODEL, requests, timed_scrape


def record(index: int, start_s: float, seconds: float, **metrics: object) -> dict[str, object]:
    return {
        "metadata": {
            "conversation_id": f"request-{index}",
            "request_start_ns": int(start_s * 1e9),
            "request_end_ns": int((start_s + seconds) * 1e9),
            "benchmark_phase": "profiling",
        },
        "metrics": {name: {"value": value, "unit": "ms"} for name, value in metrics.items()},
    }


def test_records_are_read_in_the_order_they_were_sent(tmp_path: Path) -> None:
    late = record(1, 11.0, 0.5, time_to_first_token=30.0, inter_token_latency=5.0, inter_chunk_latency=[4.0, 9.0],
                  usage_prompt_tokens=7, usage_completion_tokens=3)  # fmt: skip
    early = {**record(0, 10.0, 0.0), "error": {"code": 500, "type": "Internal", "message": "no\n luck"}}
    warm_up = record(2, 9.0, 1.0)
    warm_up["metadata"]["benchmark_phase"] = "warmup"  # type: ignore[index]
    path = tmp_path / "profile_export.jsonl"
    path.write_text("\n".join(map(json.dumps, (late, early, warm_up))))
    failed, done = read_records(path)
    assert failed.error == "500 Internal no luck"
    assert (done.index, done.ttft_ms, done.itl_ms, done.longest_gap_ms) == (1, 30.0, 5.0, 9.0)
    assert (done.input_tokens, done.output_tokens, done.e2e_s) == (7, 3, 0.5)


def test_missing_or_foreign_records_are_said(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="left no records"):
        read_records(tmp_path / "none")
    (tmp_path / "other").write_text('{"hello": 1}')
    with pytest.raises(RecordsError, match="cannot be read"):
        read_records(tmp_path / "other")


def test_goodput_counts_requests_within_every_limit_and_failed_ones_as_missed() -> None:
    sent = requests(10, ttft_ms=50.0, itl_ms=10.0)  # time to first token 50 to 59 ms
    shapes = [RequestShape(9, 20)] * 10
    client = client_figures(sent, shapes, Slo(ttft_ms=54.0, itl_ms=10.0))
    assert client.good_share == 0.5
    assert client.good_requests_per_s == pytest.approx(5 / client.duration_s, rel=1e-5)
    assert client_figures(sent, shapes, Slo(ttft_ms=54.0, itl_ms=9.0)).good_share == 0.0
    assert client_figures(sent, shapes, Slo()).good_share is None


def test_outputs_of_another_length_are_counted() -> None:
    client = client_figures(
        requests(3, tokens=20), [RequestShape(9, 20), RequestShape(9, 21), RequestShape(9, 20)], Slo()
    )
    assert client.num_wrong_length == 1
    assert client_figures(requests(3), [RequestShape(9, 9)] * 3, Slo(), forced=False).num_wrong_length is None
    assert client.output_tokens_per_s == pytest.approx(60 / client.duration_s, rel=1e-5)


IDLE = {"kv_cache_usage_ratio": 0.0, "num_preemptions_total": 5.0, "num_requests_running": 0.0}


def test_counters_grow_between_the_scrapes_around_the_load_and_gauges_are_taken_within() -> None:
    busy = {**IDLE, "kv_cache_usage_ratio": 1.0, "kv_internal_fragmentation_ratio": 0.1, "num_requests_running": 2.0}
    samples = [
        timed_scrape(7.0, {**IDLE, "num_preemptions_total": 1.0}),  # the warm-up's
        timed_scrape(9.0, IDLE),
        timed_scrape(10.5, {**busy, "num_preemptions_total": 6.0}, kv_stranded_ratio=0.25),
        timed_scrape(11.5, {**busy, "num_preemptions_total": 9.0, "kv_cache_usage_ratio": 0.5}),
        timed_scrape(13.0, {**IDLE, "num_preemptions_total": 9.0, "kv_throttled_seconds_total": 1.5}),
        timed_scrape(14.0, {**IDLE, "num_preemptions_total": 99.0}),  # of whoever came later
    ]
    service = service_figures(samples, 10.0, 12.5, MODEL)
    assert service is not None
    assert service.num_preemptions == 4.0
    assert (service.num_samples, service.kv_usage_mean, service.kv_usage_max, service.kv_full_share) == (
        2,
        0.75,
        1.0,
        0.5,
    )
    assert service.throttled_share == pytest.approx(1.5 / 2.5)
    assert service.stranded_max == 0.25
    assert service.internal_fragmentation == pytest.approx(0.1)
    assert service.series.time_s == [-1.0, 0.5, 1.5, 3.0]
    assert service.series.preemptions == [0.0, 1.0, 4.0, 4.0]
    assert [replica.name for replica in service.replicas] == ["DP2/0"]


def test_shares_of_step_time_are_over_all_ranks_and_the_recompute_tax_over_all_tokens_computed() -> None:
    before = {
        f"step_seconds_sum{{phase={phase},rank={rank},sampled=true}}": 1.0
        for phase in ("attention", "collective")
        for rank in (0, 1)
    }
    after = {
        **{name: value + (3.0 if "attention" in name else 1.0) for name, value in before.items()},
        "collective_seconds_sum{op=all_reduce,phase=wait,rank=0,group=tp}": 1.5,
        "collective_seconds_sum{op=all_reduce,phase=transfer,rank=1,group=tp}": 0.5,
        "recomputed_tokens_total": 10.0,
        "prompt_tokens_total": 50.0,
        "prefix_cache_hits_total": 20.0,
        "generation_tokens_total": 60.0,
    }
    samples = [timed_scrape(0.0, {**IDLE, **before}), timed_scrape(1.5, IDLE), timed_scrape(3.0, {**IDLE, **after})]
    service = service_figures(samples, 1.0, 2.0, MODEL)
    assert service is not None
    assert service.num_ranks == 2
    assert service.collective_wait_share == pytest.approx(1.5 / 8)
    assert service.collective_share == pytest.approx(2.0 / 8)
    assert service.step_share == {"attention": 0.75, "collective": 0.25}
    assert service.recompute_tax == pytest.approx(0.1)
    assert service.bubble_share is None


def test_one_rank_has_no_collectives() -> None:
    steps = {"step_seconds_sum{phase=attention,rank=0,sampled=true}": 1.0}
    samples = [timed_scrape(0.0, IDLE), timed_scrape(1.5, IDLE), timed_scrape(3.0, {**IDLE, **steps})]
    service = service_figures(samples, 1.0, 2.0, MODEL)
    assert service is not None
    assert service.collective_share is None


def test_what_one_replica_uses_is_not_hidden_by_the_other() -> None:
    full, empty = {**IDLE, "kv_cache_usage_ratio": 0.99}, IDLE
    samples = [timed_scrape(0.0, IDLE, IDLE), timed_scrape(1.5, full, empty), timed_scrape(3.0, IDLE, IDLE)]
    service = service_figures(samples, 1.0, 2.0, MODEL)
    assert service is not None
    assert service.kv_full_share == 1.0
    assert [replica.kv_full_share for replica in service.replicas] == [1.0, 0.0]


def test_without_a_scrape_on_either_side_nothing_is_claimed() -> None:
    samples = [timed_scrape(1.2, IDLE), timed_scrape(3.0, IDLE)]
    assert service_figures(samples, 1.0, 2.0, MODEL) is None
    assert service_figures([timed_scrape(0.5, IDLE), timed_scrape(1.2, IDLE)], 1.0, 2.0, MODEL) is None


def test_scrapes_that_lack_a_replica_are_left_out_and_counted() -> None:
    old = {**IDLE, "num_preemptions_total": 500.0}
    busy = {**old, "kv_cache_usage_ratio": 0.5}
    samples = [
        timed_scrape(8.0, old, old, scrape_missing_replicas=0),
        timed_scrape(9.0, old, scrape_missing_replicas=1),
        timed_scrape(10.5, busy, busy),
        timed_scrape(11.5, busy, scrape_missing_replicas=1),
        timed_scrape(12.5, busy, busy, scrape_missing_ingresses=1),
        timed_scrape(14.0, old, old),
    ]
    service = service_figures(samples, 10.0, 13.0, MODEL)
    assert service is not None
    assert service.num_preemptions == 0.0
    assert (service.num_scrapes_incomplete, service.num_samples, service.window_s) == (3, 1, 6.0)
    assert [replica.kv_usage_mean for replica in service.replicas] == [0.5, 0.5]
    assert service.series.time_s == [-2.0, 0.5, 4.0]
    never_whole = [samples[1], *samples[2:]]
    assert service_figures(never_whole, 10.0, 13.0, MODEL) is None


def test_what_another_model_lacks_does_not_matter() -> None:
    lacking = frozenset({("model_name", "another"), ("placement", "TP2")})
    samples = [timed_scrape(0.0, IDLE), timed_scrape(1.5, IDLE), timed_scrape(3.0, IDLE)]
    for sample in samples:
        sample.scrape.samples["ridgewalk_scrape_missing_replicas", lacking] = 1.0  # type: ignore[index]
    service = service_figures(samples, 1.0, 2.0, MODEL)
    assert service is not None
    assert service.num_scrapes_incomplete == 0


def test_a_counter_that_fell_was_started_anew() -> None:
    counts = (500.0, 520.0, 3.0, 10.0, 530.0)  # the last one is over the first again, and yet not 30 more
    samples = [timed_scrape(float(i), {**IDLE, "num_preemptions_total": value}) for i, value in enumerate(counts)]
    service = service_figures(samples, 0.5, 3.5, MODEL)
    assert service is not None
    assert service.num_preemptions == 20.0 + 3.0 + 7.0 + 520.0
    assert service.replicas[0].num_preemptions == 550.0
    assert service.series.preemptions == [0.0, 20.0, 23.0, 30.0, 550.0]


@pytest.mark.parametrize("suffix", ["_total", "_count", "_sum", "_bucket"])
def test_only_counters_are_ever_started_anew(suffix: str) -> None:
    def scrape(value: float) -> Scrape:
        return Scrape.parse(f"a{suffix} {value}\nlevel {value}\n")

    grown = scrape(2.0).since(scrape(5.0))
    assert (grown.total(f"a{suffix}"), grown.total("level")) == (2.0, -3.0)
    assert scrape(7.0).since(scrape(5.0)).total(f"a{suffix}") == 2.0


def test_a_replica_that_joins_within_the_load_was_not_empty_before() -> None:
    busy = {**IDLE, "kv_cache_usage_ratio": 0.8, "num_requests_running": 4.0}
    samples = [
        timed_scrape(0.0, IDLE),
        timed_scrape(1.5, busy),
        timed_scrape(2.5, busy, {**busy, "num_preemptions_total": 0.0}),
    ]
    samples.append(timed_scrape(4.0, IDLE, {**IDLE, "num_preemptions_total": 2.0}))
    service = service_figures(samples, 1.0, 3.0, MODEL)
    assert service is not None
    assert service.kv_usage_mean == 0.8
    assert [replica.kv_usage_mean for replica in service.replicas] == [0.8, 0.8]
    assert service.num_preemptions == 2.0
    assert service.series.kv_usage[1] == [None, None, 0.8, 0.0]


def test_a_full_attention_group_is_not_hidden_by_the_mean_over_groups() -> None:
    blocks = {
        "kv_blocks{group=0,state=used}": 100.0,
        "kv_blocks{group=0,state=cached}": 0.0,
        "kv_blocks{group=1,state=used}": 10.0,
        "kv_blocks{group=1,state=cached}": 40.0,
        "kv_blocks{group=1,state=free}": 50.0,
    }
    busy = {**IDLE, "kv_cache_usage_ratio": 0.55, **blocks}
    samples = [timed_scrape(0.0, IDLE), timed_scrape(1.5, busy), timed_scrape(3.0, IDLE)]
    service = service_figures(samples, 1.0, 2.0, MODEL)
    assert service is not None
    for of in (service, service.replicas[0]):
        assert (of.kv_usage_mean, of.kv_usage_max, of.kv_full_share) == (0.55, 1.0, 1.0)
    assert (service.series.kv_usage, service.series.kv_fullest) == ([[0.0, 0.55, 0.0]], [[0.0, 1.0, 0.0]])


def test_without_a_scrape_within_the_load_its_gauges_are_not_known_and_its_counters_are() -> None:
    after = {**IDLE, "num_preemptions_total": 7.0, "kv_throttled_seconds_total": 0.2}
    service = service_figures([timed_scrape(0.5, IDLE, IDLE), timed_scrape(2.0, after, after)], 1.0, 1.4, MODEL)
    assert service is not None
    assert (service.num_samples, service.kv_usage_mean, service.kv_usage_max, service.kv_full_share) == (
        0,
        None,
        None,
        None,
    )
    assert [(r.kv_usage_max, r.running_max, r.num_preemptions) for r in service.replicas] == [(None, None, 2.0)] * 2
    assert service.throttled_share == pytest.approx(0.5)  # of each of the two replicas
