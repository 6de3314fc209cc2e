"""What one replica exports, from states small enough to compute by hand."""

from __future__ import annotations

import threading

import pytest

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.stats import GroupStats
from ridgewalk.metrics.utilization import HardwarePeaks
from tests.engine.fake_ranks import FakeExecutor
from tests.metrics.builders import Clock, make_metrics, make_stats, make_timings, samples, scrape, value


def test_gauges_of_a_known_state() -> None:
    metrics = make_metrics()
    metrics.on_stats(make_stats([GroupStats(6, 1, 3, 12, 2), GroupStats(2, 2, 6, 4, 1)], num_waiting=5))
    text = scrape(metrics)
    assert value(text, "num_requests_running") == 3
    assert value(text, "num_requests_waiting") == 5
    assert value(text, "kv_blocks", group="0", state="used") == 6
    assert value(text, "kv_blocks", group="1", state="cached") == 2
    assert value(text, "kv_blocks", group="1", state="free") == 6
    assert value(text, "kv_cache_usage_ratio") == 8 / 20
    assert value(text, "kv_internal_fragmentation_ratio") == 16 / 128


def test_predicted_peaks_are_shares_of_each_groups_cache_and_absent_when_nobody_predicts() -> None:
    metrics = make_metrics()
    groups = [GroupStats(6, 1, 3, 12, 2, predicted_peak_blocks=9.5), GroupStats(2, 2, 6, 4, 1, predicted_peak_blocks=2)]
    metrics.on_stats(make_stats(groups))
    text = scrape(metrics)
    assert value(text, "kv_predicted_peak_ratio", group="0") == 0.95
    assert value(text, "kv_predicted_peak_ratio", group="1") == 0.2
    metrics.on_stats(make_stats())
    assert value(scrape(metrics), "kv_predicted_peak_ratio", group="0") is None


def test_swap_space_is_shown_where_there_is_some() -> None:
    metrics = make_metrics()
    metrics.on_stats(make_stats(swap_blocks=8, used_swap_blocks=2))
    assert value(scrape(metrics), "kv_swap_usage_ratio") == 0.25
    metrics.on_stats(make_stats())
    assert value(scrape(metrics), "kv_swap_usage_ratio") is None


def test_an_idle_cache_wastes_nothing() -> None:
    metrics = make_metrics()
    metrics.on_stats(make_stats())
    assert value(scrape(metrics), "kv_internal_fragmentation_ratio") == 0


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("num_preemptions_total", "num_preemptions"),
        ("recomputed_tokens_total", "recomputed_tokens"),
        ("kv_blocks_swapped_out_total", "swapped_out_blocks"),
        ("kv_blocks_swapped_in_total", "swapped_in_blocks"),
        ("prefix_cache_queries_total", "prefix_cache_queries"),
        ("prefix_cache_hits_total", "prefix_cache_hits"),
        ("prompt_tokens_total", "prompt_tokens"),
        ("generation_tokens_total", "generation_tokens"),
        ("engine_steps_total", "steps"),
        ("kv_throttled_seconds_total", "throttled_seconds"),
    ],
)
def test_totals_are_the_engines_own(name: str, field: str) -> None:
    metrics = make_metrics()
    metrics.on_stats(make_stats(**{field: 7}))
    metrics.on_stats(make_stats(**{field: 9.5}))
    text = scrape(metrics)
    assert value(text, name, model_name="m", placement="TP1", replica="0") == 9.5


def test_queue_times_fall_into_cumulative_buckets() -> None:
    metrics = make_metrics()
    for seconds in (0.01, 0.011, 500.0):  # on a bound, above it, beyond the last
        metrics.on_admitted(seconds)
    text = scrape(metrics)
    assert value(text, "request_queue_time_seconds_bucket", le="0.005") == 0
    assert value(text, "request_queue_time_seconds_bucket", le="0.01") == 1
    assert value(text, "request_queue_time_seconds_bucket", le="0.02") == 2
    assert value(text, "request_queue_time_seconds_bucket", le="160.0") == 2
    assert value(text, "request_queue_time_seconds_bucket", le="+Inf") == 3
    assert value(text, "request_queue_time_seconds_count") == 3
    assert value(text, "request_queue_time_seconds_sum") == pytest.approx(500.021)


def test_ended_sequences_are_counted_by_reason() -> None:
    metrics = make_metrics()
    for reason in (FinishReason.STOP, FinishReason.ABORT, FinishReason.STOP):
        request = Request(0, "r", 0, [1], 1, SamplingParams(max_tokens=1), finish_reason=reason)
        metrics.on_ended(request)
    text = scrape(metrics)
    assert value(text, "sequences_ended_total", finished_reason="stop") == 2
    assert value(text, "sequences_ended_total", finished_reason="abort") == 1
    assert value(text, "sequences_ended_total", finished_reason="length") == 0


def test_before_the_first_report_the_engines_state_is_absent_and_the_mesh_known() -> None:
    text = scrape(make_metrics(tp=2))
    assert value(text, "placement_info", tensor_parallel_size="2", dtype="float32", device="cpu") == 1
    assert value(text, "num_requests_running") is None
    assert value(text, "prompt_tokens_total") is None


def test_phases_and_the_rest_add_up_to_the_step() -> None:
    metrics = make_metrics()
    metrics.on_timings([make_timings(0, step=0.010, attention=0.004, mlp=0.003)])
    metrics.on_timings([make_timings(0, step=0.020, attention=0.008, mlp=0.002)])
    text = scrape(metrics)
    assert value(text, "step_seconds_sum", phase="attention", rank="0", sampled="true") == pytest.approx(0.012)
    assert value(text, "step_seconds_sum", phase="other") == pytest.approx(0.013)
    assert value(text, "step_seconds_count", phase="mlp") == 2
    assert sum(
        each for (name, _), each in samples(text).items() if name == "ridgewalk_step_seconds_sum"
    ) == pytest.approx(0.03)


def test_utilization_against_known_peaks() -> None:
    """2 s, 10 steps, 100 useful tokens, 32 filled slots of 2 sequences."""
    clock = Clock()
    metrics = make_metrics(tp=2, clock=clock, peaks=HardwarePeaks(1e6, 1e6))
    metrics.on_stats(make_stats())
    clock.now += 2
    group = GroupStats(3, 0, 97, 16, 2)
    metrics.on_stats(make_stats([group], steps=10, computed_tokens=130, recomputed_tokens=30))
    text = scrape(metrics)
    # FLOPs: weights 2 * (2 layers * (8 * (2*8 + 2*4 + 3*16)) + 64*8) = 3328, attention 4 * 2 * 8 * 16 = 1024
    assert value(text, "model_flops_utilization") == pytest.approx(100 * 4352 / 2 / 2e6)
    # a rank: 64*8 embedding and head halves (512), 2 layers of 8*(2*4 + 2*2 + 3*8) + 16, 8: 1128 floats;
    # KV: 32 slots of 2 * 2 layers * 1 head * 2 floats
    assert value(text, "model_bandwidth_utilization") == pytest.approx(10 * (1128 * 4 + 32 * 8 * 4) / 2 / 1e6)


def test_without_known_peaks_there_is_no_utilization() -> None:
    clock = Clock()
    metrics = make_metrics(clock=clock)
    metrics.on_stats(make_stats())
    clock.now += 2
    metrics.on_stats(make_stats(steps=10, computed_tokens=100))
    text = scrape(metrics)
    assert value(text, "model_flops_utilization") is None
    assert value(text, "model_bandwidth_utilization") is None


def test_what_a_real_engine_recomputes_is_counted() -> None:
    """Four blocks of 2 and two sequences that each grow to 6 tokens: the second is preempted and computed again."""
    config = SchedulerConfig(num_blocks=4, block_size=2, max_model_len=8, enable_prefix_caching=False)
    clock = Clock()
    core = EngineCore(config, FakeExecutor(2), clock)
    requests = [core.add("r", index, [index, 1], SamplingParams(max_tokens=5)) for index in range(2)]
    metrics = make_metrics(clock=clock)
    computed = 0
    while core.has_work:
        for result in core.pump():
            for request in result.ended:
                metrics.on_ended(request)
        metrics.on_stats(core.stats())
        clock.now += 0.01
    for step in core.executor.steps:  # type: ignore[attr-defined]
        computed += step.num_tokens
    text = scrape(metrics)
    # Without preemption a sequence of 2 + 5 tokens computes 6: the last one sampled is never computed.
    assert value(text, "recomputed_tokens_total") == computed - 12
    assert value(text, "recomputed_tokens_total") == 4  # preempted at 4 computed tokens, when both wanted a third block
    assert value(text, "num_preemptions_total") == sum(request.num_preemptions for request in requests) == 1
    assert value(text, "generation_tokens_total") == 10
    assert value(text, "prompt_tokens_total") == 4
    assert value(text, "sequences_ended_total", finished_reason="length") == 2
    throttled = value(text, "kv_throttled_seconds_total")
    assert throttled is not None
    assert throttled > 0


def test_snapshots_from_another_thread_never_go_back() -> None:
    metrics = make_metrics(tp=2)
    stop = threading.Event()

    def record() -> None:
        while not stop.is_set():
            metrics.on_admitted(0.01)
            metrics.on_timings([make_timings(rank, ("all_reduce", 1e-4 + rank), mlp=0.001) for rank in range(2)])
            metrics.on_stats(make_stats())

    thread = threading.Thread(target=record)
    thread.start()
    try:
        last: dict[object, float] = {}
        for _ in range(30):
            now = samples(scrape(metrics))
            assert all(now[key] >= before for key, before in last.items())  # type: ignore[index]
            counts = [each for (name, _), each in now.items() if name == "ridgewalk_collective_seconds_count"]
            assert len(set(counts)) <= 1
            last = {key: each for key, each in now.items() if not key[0].endswith("ratio")}
    finally:
        stop.set()
        thread.join()
