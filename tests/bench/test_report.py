"""The report: data that survives, words that fit it, pages that need nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from ridgewalk.bench.figures import count, milliseconds, percent, seconds
from ridgewalk.bench.findings import find_cliff
from ridgewalk.bench.page import common_points, compare_findings, compare_page, report_page
from ridgewalk.bench.report import Point, Report, read_report, write_report
from ridgewalk.config import ConfigError
from tests.bench.builders import point, report, without_service

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
        "KV cache was full for 100 % of the run; 24 preemptions recomputed 55 % of the tokens."
    )
    assert report(SWEEP[0]).findings[0].startswith("KV cache was never full: at most 50 %")
    assert (
        report(point(4, preemptions=1)).findings[0].startswith("KV cache was full for moments between two samples; 2")
    )


def test_the_page_of_a_sweep_needs_nothing_else_and_shows_every_load() -> None:
    page = report_page(report(*SWEEP[1:]))
    assert_self_contained(page)
    for text in ("concurrency 64", "over the capacity cliff", "Recompute tax", "DP2/1", "for &lt;tests&gt;"):
        assert text in page
    assert page.count("<svg") == 1 + 1 + 1 + 2  # against load, distributions, lengths, over time


def test_the_page_of_another_server_has_the_clients_figures_only() -> None:
    page = report_page(report(without_service(SWEEP[0])))
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
    assert "did not ask the same" in compare_findings(first, report(*SWEEP[:2], name="chat"))[-1]


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
