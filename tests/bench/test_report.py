"""The report: data that survives, words that fit it, pages that need nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from ridgewalk.bench import page as pages
from ridgewalk.bench.figures import CLIENT, SERVICE, count, milliseconds, percent, seconds
from ridgewalk.bench.findings import find_cliff, findings
from ridgewalk.bench.page import common_points, compare_findings, compare_page, report_page
from ridgewalk.bench.plots import time_plot
from ridgewalk.bench.report import Point, Report, Series, Slo, read_report, write_report
from ridgewalk.config import ConfigError
from tests.bench.builders import SLO, point, report, without_output, without_service

SWEEP = (point(4), point(16), point(64, preemptions=12, usage=(1.0, 0.97), slower=3.0))


class _Outside(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "img", "object", "embed", "base"):
            self.found.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster") or (
                name in ("href", "xlink:href") and not (value or "").startswith("#")
            ):
                self.found.append(f"{name}={value}")


def assert_self_contained(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)), "two plots share an id"
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', page)) <= set(ids)
    parser = _Outside()
    parser.feed(page)
    assert parser.found == []
    assert re.findall(r"url\((?!#)[^)]*\)|@import|<!DOCTYPE svg", page) == []


def test_a_report_survives_its_json(tmp_path: Path) -> None:
    written = report(*SWEEP)
    write_report(written, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == written


def test_a_report_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(msgspec.structs.replace(report(SWEEP[0]), schema_version=99), path)
    with pytest.raises(ConfigError, match="schema version 99, and this version reads 1"):
        read_report(path)
    path.write_text('{"schema_version": 1}')
    with pytest.raises(ConfigError, match=r"is not a report\.json"):
        read_report(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_report(tmp_path / "none.json")


def test_a_sweep_says_where_the_cliff_is() -> None:
    assert find_cliff(SWEEP) == 2
    first, price, *_ = report(*SWEEP).findings
    assert first == (
        "The capacity cliff lies between concurrency 16 and 64. At concurrency 64 the KV cache was full for 100 % of "
        "the run; 24 preemptions recomputed 55 % of the tokens."
    )
    assert price.startswith("From concurrency 16 to 64 throughput went from ")
    assert report(SWEEP[2], SWEEP[2]).findings[0].startswith("The capacity cliff is passed already at concurrency 64.")
    assert report(*SWEEP[:2]).findings[0] == "No load reached the capacity cliff: at most 50 % of a KV cache was used."


def test_what_failed_is_said_once_with_the_loads_it_failed_at() -> None:
    broken = [
        msgspec.structs.replace(a, client=msgspec.structs.replace(a.client, num_failed=2, errors={"500 no": 2}))
        for a in SWEEP[:2]
    ]
    assert report(*broken, SWEEP[2]).findings[-1] == "4 requests failed at concurrency 4, 16, most with: 500 no"


def test_tokens_that_no_client_got_are_noticed() -> None:
    assert not any("used by others" in sentence for sentence in report(*SWEEP).findings)
    assert "than these clients got at concurrency 16" in report(SWEEP[0], point(16, foreign=5.0)).findings[-1]


def test_clients_that_lag_behind_the_service_are_noticed() -> None:
    def with_ingress(ttft_mean_ms: float) -> Point:  # clients saw 54.5 ms times 3
        a_point = point(4, slower=3.0)
        service = msgspec.structs.replace(a_point.service, ttft_mean_ms=ttft_mean_ms)
        return msgspec.structs.replace(a_point, service=service)

    assert "much later than the service sent them" in report(with_ingress(60.0)).findings[-1]
    assert not any("later than the service" in sentence for sentence in report(with_ingress(120.0)).findings)


def test_one_load_says_what_the_kv_cache_did() -> None:
    assert report(SWEEP[2]).findings[0] == (
        "The KV cache was full for 100 % of the run; 24 preemptions recomputed 55 % of the tokens."
    )
    assert report(SWEEP[0]).findings[0].startswith("The KV cache was never full: at most 50 %")
    moments = report(point(4, preemptions=1)).findings[0]
    assert moments.startswith("The KV cache was full for moments between two samples; 2")


def test_a_load_too_short_to_be_seen_is_not_said_to_be_empty() -> None:
    seen = "oad was too short to see how full the KV cache was: no complete scrape of /metrics fell within it; "
    short, over = point(4, seen=False), point(64, seen=False, preemptions=12)
    assert report(short).findings[0] == f"The l{seen}nothing was preempted."
    assert report(over).findings[0] == f"The l{seen}24 preemptions recomputed 55 % of the tokens."
    said = report(short, SWEEP[1], over).findings
    assert f"At concurrency 64 the l{seen}24 preemptions" in said[0]
    assert said[-1].startswith("No complete scrape of /metrics fell within the load at concurrency 4, 64:")
    unseen = report(short, short).findings
    assert unseen[0] == "No load reached the capacity cliff: nothing was preempted."
    assert "KV cache used" not in pages._table(SERVICE, [short])
    assert "<td>DP2/0</td><td>–</td><td>–</td><td>–</td><td>–</td><td>–</td><td>0</td>" in pages._replica_table(short)


def test_scrapes_that_were_left_out_are_said_and_so_are_loads_without_any() -> None:
    service = msgspec.structs.replace(SWEEP[1].service, num_scrapes_incomplete=3)
    partial = msgspec.structs.replace(SWEEP[1], service=service)
    said = report(SWEEP[0], partial).findings
    assert said[-1].startswith("Some scrapes of /metrics lacked a replica or an ingress at concurrency 16 and are left")
    said = report(SWEEP[0], without_service(SWEEP[1])).findings
    assert said[-1].startswith("What the service measured at concurrency 16 is not known: before the load or after it")


def test_a_load_that_is_missing_is_said_before_other_warnings() -> None:
    said = findings([without_service(SWEEP[0])], is_ridgewalk=False, missing="The load at concurrency 16 failed.")
    assert said[-2:] == [
        "The load at concurrency 16 failed.",
        "The server exports no Ridgewalk metrics: the report has the clients' figures only.",
    ]


def test_the_page_of_a_sweep_needs_nothing_else_and_shows_every_load() -> None:
    page = report_page(report(*SWEEP[1:]))
    assert_self_contained(page)
    for text in ("concurrency 64", "over the capacity cliff", "Recompute tax", "DP2/1", "for &lt;tests&gt;"):
        assert text in page
    assert page.count("<svg") == 1 + 1 + 1 + 2  # against load, distributions, lengths, over time


def test_a_plot_over_time_has_gaps_and_shows_groups_fuller_than_the_mean() -> None:
    known: list[float | None] = [0.0, 1.0, 2.0]
    series = Series(
        time_s=[0.0, 1.0, 2.0], replicas=["TP2/0", "DP2xEP2/0"], kv_usage=[[None, 0.5, 0.5], [0.0, 0.55, 0.2]],
        kv_fullest=[[None, 0.5, 0.5], [0.0, 1.0, 0.3]], running=[[None, 1.0, 2.0], known], waiting=[known, known],
        preemptions=[0.0, 0.0, 0.0], generation_tokens_per_s=[0.0, 9.0, 9.0], stranded=[None, None, None],
    )  # fmt: skip
    svg = time_plot(series, 2.0)
    assert svg.count("fullest group") == 1
    assert "DP2xEP2/0 fullest group" in svg
    time_plot(msgspec.structs.replace(series, kv_fullest=[]), 2.0)  # of reports from before there were any


def test_the_page_of_another_server_has_the_clients_figures_only() -> None:
    page = report_page(report(without_service(SWEEP[0]), is_ridgewalk=False))
    assert_self_contained(page)
    assert "exports no Ridgewalk metrics" in page
    assert "What the service measured" not in page
    assert "Output tokens/s" in page


def test_two_runs_are_compared_load_by_load_with_ratios() -> None:
    first, second = report(*SWEEP[:2]), report(point(16, slower=2.0), SWEEP[2])
    page = compare_page(first, second, ("a.json", "b.json"))
    assert_self_contained(page)
    assert [(a.label, b.label) for a, b in common_points(first, second)] == [("concurrency 16", "concurrency 16")]
    assert "<td class=worse>2.00</td>" in page  # inter-token latency
    assert "did not ask the same" not in page
    assert "Inter-token latency, means of requests, p99" in page

    def last_words(**others: object) -> str:
        return compare_findings(first, report(*SWEEP[:2], **others))[-1]  # type: ignore[arg-type]

    assert "did not ask the same: they differ in profile or trace and seed," in last_words(name="chat", seed=5)
    assert last_words(slo=Slo(ttft_ms=500.0)) == (
        "The runs were held to different SLOs (A: time to first token within 100 ms, mean inter-token latency within "
        "20 ms; B: time to first token within 500 ms): their goodput and shares within the SLO cannot be compared."
    )
    assert "different SLOs (A: time to first token within 100 ms" in last_words(slo=Slo())
    assert "SLO" not in last_words(slo=SLO)


def test_runs_in_which_something_was_nothing_are_compared_without_a_ratio() -> None:
    dead, alive = report(without_output(SWEEP[0])), report(SWEEP[2])
    table = pages._ratio_table((*CLIENT, *SERVICE), dead.points[0], alive.points[0])
    assert "<td class=worse>0 → 24</td>" in table  # preemptions
    assert re.search(r"<td class=better>0 → \d+</td>", table)  # output tokens/s
    first, *_ = compare_findings(dead, alive)
    assert re.fullmatch(r"At concurrency 64 B writes \d+ tokens/s and A 0\.", first)
    assert "throughput went from 0 tokens/s to" in " ".join(report(without_output(SWEEP[0]), SWEEP[2]).findings)


def test_a_report_without_loads_is_refused_and_does_not_break_the_page(tmp_path: Path) -> None:
    empty = msgspec.structs.replace(report(SWEEP[0]), points=[])
    write_report(empty, tmp_path / "report.json")
    with pytest.raises(ConfigError, match=r"--compare: .*report\.json is a report without any load"):
        read_report(tmp_path / "report.json")
    assert_self_contained(compare_page(empty, report(SWEEP[0]), ("a.json", "b.json")))


def test_single_loads_are_compared_whatever_they_are() -> None:
    first, second = report(SWEEP[0]), report(SWEEP[2])
    assert common_points(first, second) == [(SWEEP[0], SWEEP[2])]
    assert common_points(report(*SWEEP[:2]), second) == []


def test_every_field_of_the_schema_is_in_the_json(tmp_path: Path) -> None:
    write_report(report(SWEEP[2]), tmp_path / "report.json")
    data = msgspec.json.decode((tmp_path / "report.json").read_bytes())
    assert set(data) == {field.name for field in msgspec.structs.fields(Report)}
    assert data["points"][0]["service"]["num_preemptions"] == 24


def test_numbers_are_written_with_units_and_no_more_digits_than_they_deserve() -> None:
    assert [milliseconds(12.345), milliseconds(999.7), milliseconds(2500.0)] == ["12.3 ms", "1 s", "2.5 s"]
    assert [seconds(0.0456), seconds(0.9999), seconds(1234.0)] == ["45.6 ms", "1 s", "1,234 s"]
    assert [percent(0.0), percent(0.004), percent(0.41), percent(1.0)] == ["0 %", "0.4 %", "41 %", "100 %"]
    assert [count(0.35), count(7.0), count(1234.5)] == ["0.35", "7", "1,234"]
