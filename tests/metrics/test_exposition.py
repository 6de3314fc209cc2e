"""The merged text."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import msgspec
import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from ridgewalk.engine.stats import GroupStats
from ridgewalk.engine.step import RankTimings
from ridgewalk.metrics import catalogue
from ridgewalk.metrics.exposition import merge
from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.metrics.snapshot import Family, Series, Snapshot, decode, encode, family_of, take_snapshot
from tests.metrics.builders import make_metrics, make_stats, make_timings, value


def full_service(num_replicas: int = 3, tp: int = 2) -> list[Snapshot]:
    """Snapshots with everything in them."""
    answers = []
    for index in range(num_replicas):
        metrics = make_metrics(str(index), tp=tp, placement=f"DP{num_replicas}xTP{tp}")
        group = GroupStats(0, 0, 100, 0, 0, throttled=index == 0, predicted_peak_blocks=50.0)
        metrics.on_stats(make_stats([group], prompt_tokens=index, num_waiting=1, head_of_line_blocks=1))
        metrics.on_admitted(0.1 * index)
        ops = ("all_reduce", "all_gather", "gather")
        phases = dict.fromkeys(("prepare", "embed", "attention", "mlp", "collective", "head", "sample"), 0.001)
        metrics.on_timings(
            [
                make_timings(rank, *((op, 1e-4 * (rank + 1)) for op in ops for _ in range(5)), **phases)
                for rank in range(tp)
            ]
        )
        answers.append(metrics.snapshot())
    answers.append(sparse_replica())
    for index in range(2):
        ingress = IngressMetrics(str(index), ["m"])
        ingress.on_first_token("m", 0.1 + index / 3)
        ingress.on_routed("m", f"DP{num_replicas}xTP{tp}", "least_loaded")
        ingress.on_error("m", 429)
        answers.append(ingress.snapshot())
    return [decode(answer) for answer in answers]


def sparse_replica() -> bytes:
    """Two stages of two ranks that share experts."""
    metrics = make_metrics(pp=2, dp=2, expert_parallel=True, placement="DP2xPP2xEP2")
    metrics.on_timings([RankTimings(0, rank, 0.01, {}, [], 0.1, [[rank + 1]], 2, 64) for rank in range(4)])
    return metrics.snapshot()


def counter_snapshot(value: float, **labels: str) -> Snapshot:
    series = [Series(tuple(labels.items()), [value])]
    return Snapshot([Family("ridgewalk_x_total", "counter", "Help.", (("", ""),), series)])


def test_equal_series_are_summed_and_others_kept() -> None:
    text = merge([counter_snapshot(1, a="1"), counter_snapshot(2.5, a="1"), counter_snapshot(4, a="2")])
    assert value(text, "x_total", a="1") == 3.5
    assert value(text, "x_total", a="2") == 4
    assert text.count(b"# TYPE ridgewalk_x_total counter\n") == 1
    assert text.count(b"# HELP ridgewalk_x_total Help.\n") == 1


def test_text_is_the_same_in_any_order_of_the_answers() -> None:
    snapshots = full_service(2)
    texts = {merge(order) for order in itertools.permutations(snapshots)}
    assert len(texts) == 1


def test_rounding_does_not_tell_the_order_of_the_answers() -> None:
    snapshots = [counter_snapshot(amount) for amount in (0.1, 0.2, 0.3)]  # (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)
    assert len({merge(order) for order in itertools.permutations(snapshots)}) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1e6)), min_size=1, max_size=20), st.randoms())
def test_counters_never_go_back_in_whatever_order_the_answers_come(events: list[tuple[int, float]], random) -> None:  # type: ignore[no-untyped-def]
    totals = [0.0, 0.0, 0.0]
    last = 0.0
    for process, amount in events:
        totals[process] += amount
        answers = [counter_snapshot(total) for total in totals]
        random.shuffle(answers)
        now = value(merge(answers), "x_total")
        assert now is not None
        assert now >= last
        last = now


def test_every_family_is_in_the_catalogue_with_its_kind_labels_and_help() -> None:
    known = {spec.name.removesuffix("_total"): spec for spec in catalogue.CATALOGUE}
    text = merge(full_service(), {("m", "DP3xTP2"): 1}).decode()
    seen = set()
    for family in text_string_to_metric_families(text):
        spec = known[family.name]
        seen.add(family.name)
        assert (family.type, family.documentation) == (spec.kind, spec.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(spec.labels), sample
            if spec.kind == "counter":
                assert sample.name == spec.name
    absent = set(known) - seen
    # Throttled from the start, so the trap is not known; no peaks and no swap space are configured.
    assert absent == {
        "ridgewalk_capacity_trap", "ridgewalk_model_flops_utilization", "ridgewalk_model_bandwidth_utilization",
        "ridgewalk_kv_swap_usage_ratio",
    }  # fmt: skip


def test_families_come_in_the_order_of_the_catalogue() -> None:
    text = merge(full_service()).decode()
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    order = [spec.name for spec in catalogue.CATALOGUE]
    assert names == sorted(names, key=order.index)


def test_missing_replicas_are_named_and_others_said_to_be_there() -> None:
    text = merge(full_service(2), {("m", "TP8"): 2, ("n", "TP1"): 1}, missing_ingresses=1)
    assert value(text, "scrape_missing_replicas", model_name="m", placement="DP2xTP2") == 0
    assert value(text, "scrape_missing_replicas", model_name="m", placement="TP8") == 2
    assert value(text, "scrape_missing_replicas", model_name="n", placement="TP1") == 1
    assert value(text, "scrape_missing_ingresses") == 1


def test_nobody_answered() -> None:
    text = merge([], {("m", "TP1"): 1})
    assert value(text, "scrape_missing_replicas") == 1
    assert value(text, "build_info") == 1
    assert value(text, "kv_stranded_ratio") is None
    assert value(text, "capacity_trap") is None


def test_label_values_and_help_are_escaped() -> None:
    odd = 'a "quoted" \\ and\na new line'
    metric = GaugeMetricFamily("ridgewalk_odd", odd, labels=["model_name"])
    metric.add_metric([odd], 1)
    text = merge([Snapshot([family_of(metric)])])
    assert value(text, "odd", model_name=odd) == 1
    assert b'# HELP ridgewalk_odd a "quoted" \\\\ and\\na new line\n' in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (3.0, "3"), (1e15 + 1, "1000000000000001"), (0.1, "0.1"), (1e-7, "1e-07"), (float("inf"), "+Inf"),
     (float("-inf"), "-Inf"), (float("nan"), "NaN")],
)  # fmt: skip
def test_numbers(number: float, text: str) -> None:
    assert f"ridgewalk_x_total {text}\n".encode() in merge([counter_snapshot(number)])


def test_buckets_that_all_versions_have_survive_an_upgrade() -> None:
    def histogram(bounds: list[str], values: list[float]) -> Snapshot:
        columns = (*(("_bucket", bound) for bound in bounds), ("_count", ""), ("_sum", ""))
        return Snapshot([Family("ridgewalk_h", "histogram", "H.", columns, [Series((), values)])])

    old = histogram(["0.1", "1.0", "+Inf"], [1, 2, 3, 3, 5.0])
    new = histogram(["0.1", "0.5", "+Inf"], [10, 20, 30, 30, 50.0])
    for order in ([old, new], [new, old]):
        text = merge(order)
        assert value(text, "h_bucket", le="0.1") == 11
        assert value(text, "h_bucket", le="+Inf") == value(text, "h_count") == 33
        assert value(text, "h_sum") == 55
        assert value(text, "h_bucket", le="1.0") is None


def test_instruments_of_prometheus_client_travel_too_without_created_series() -> None:
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("ridgewalk_c", "C.", registry=registry).inc(2)
    prometheus_client.Histogram("ridgewalk_h", "H.", ["op"], buckets=[1], registry=registry).labels("x").observe(0.5)
    text = merge([decode(encode(take_snapshot(registry)))])
    assert value(text, "c_total") == 2
    assert value(text, "h_bucket", op="x", le="1.0") == 1
    assert b"_created" not in text


def test_what_is_not_a_snapshot_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(b"\x93\x01\x02\x03")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_complain_of() -> None:
    text = merge(full_service(), {("m", "DP3xTP2"): 1})
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
