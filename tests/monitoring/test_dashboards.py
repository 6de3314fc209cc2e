"""Grafana's dashboards: JSON and code in step, every panel explains itself, every query reads what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.queries import MONITORING, filled, panel_queries, readable, rules

pytest.importorskip("grafana_foundation_sdk.builders.dashboard", reason="its dashboards need Python 3.11 or newer")

from monitoring.grafana.board import FIRING, Board
from monitoring.grafana.generate import BOARDS, FOLDER, file_of, text_of

READABLE = readable()
EVERY_BOARD = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
KEYWORDS = {"or", "and", "sum", "min", "max", "count", "rate", "scalar", "vector",
            "histogram_quantile"}  # fmt: skip


def json_of(board: Board) -> dict[str, Any]:
    return json.loads(file_of(board).read_text())


def panels(board: Board) -> list[dict[str, Any]]:
    return [panel for panel in json_of(board)["panels"] if panel["type"] != "row"]


@EVERY_BOARD
def test_the_json_is_what_the_code_says(board: Board) -> None:
    assert file_of(board).read_text() == text_of(board), "run: python -m monitoring.grafana.generate"


def test_there_is_no_json_without_code() -> None:
    assert set(FOLDER.glob("*.json")) == {file_of(board) for board in BOARDS}
    assert len({board.uid for board in BOARDS}) == len(BOARDS) == 4


@EVERY_BOARD
def test_every_panel_says_its_unit_what_it_shows_and_what_to_do(board: Board) -> None:
    for panel in panels(board):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        shows, _, act = panel["description"].partition("\n\n**What to do:** ")
        assert shows.endswith("."), panel["title"]
        assert act.endswith("."), panel["title"]
        assert panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["title"] for panel in panels(board)}) == len(panels(board))


@EVERY_BOARD
def test_panels_have_ids_of_their_own_and_do_not_overlap(board: Board) -> None:
    found = json_of(board)["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    cells = [
        {(x, y) for x in range(pos["x"], pos["x"] + pos["w"]) for y in range(pos["y"], pos["y"] + pos["h"])}
        for pos in (panel["gridPos"] for panel in found)
    ]
    assert all(x < 24 for cell in cells for x, _ in cell)
    assert not any(one & other for one, other in combinations(cells, 2))


@EVERY_BOARD
def test_every_query_reads_series_and_labels_that_exist(board: Board) -> None:
    for query in panel_queries(json_of(board)):
        where = f"{board.uid}: {query.panel}: {query.expr}"
        read = set(re.findall(r"\b(?:ridgewalk[:_][\w:]+|scrape_\w+|up|ALERTS)\b", query.expr))
        assert read, where
        assert read <= set(READABLE), where
        for name, matchers in re.findall(r"([\w:]+)\{([^}]*)\}", query.expr):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= READABLE[name], where
        labels = set.union(*(READABLE[name] for name in read))
        grouped = re.findall(r"(?:by|on|ignoring) \(([^)]*)\)", query.expr)
        assert {label for part in grouped for label in re.findall(r"\w+", part)} <= labels, where
        assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= labels, where
        bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|(?:by|on|ignoring|group_left) \([^)]*\)", "", query.expr)
        assert set(re.findall(r"[a-zA-Z_][\w:]*", bare)) <= read | KEYWORDS, where


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_every_query_is_promql(tmp_path: Path) -> None:
    queries = [query for board in BOARDS for query in panel_queries(json_of(board))]
    recording = [{"record": f"q{i}", "expr": filled(query.expr, "1m")} for i, query in enumerate(queries)]
    file = tmp_path / "queries.rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recording}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@EVERY_BOARD
def test_boards_share_variables_links_and_alert_annotations(board: Board) -> None:
    written = json_of(board)
    assert [each["name"] for each in written["templating"]["list"]] == ["datasource", "model_name", "placement"]
    for variable in written["templating"]["list"][1:]:
        (name, matchers, label) = re.fullmatch(
            r"label_values\((\w+)(?:\{(.*)\})?, (\w+)\)", variable["query"]["query"]
        ).groups()  # type: ignore[union-attr]
        assert label == variable["name"]
        assert {label, *re.findall(r"(\w+)=~", matchers or "")} <= READABLE[name]
    (link,) = written["links"]
    assert (link["type"], link["tags"], link["includeVars"], link["keepTime"]) == (
        "dashboards",
        ["ridgewalk"],
        True,
        True,
    )
    assert written["tags"] == ["ridgewalk"]
    assert FIRING in {each.get("expr") for each in written["annotations"]["list"]}


def test_every_metric_is_on_a_dashboard() -> None:
    shown = " ".join(query.expr for board in BOARDS for query in panel_queries(json_of(board)))
    shown += " ".join(rule["expr"] for rule in rules() if rule.get("record", "none") in shown)
    missing = {
        name
        for name in READABLE
        if name.startswith("ridgewalk_") and not name.endswith(("_bucket", "_sum", "_count"))
        and not any(f"{name}{part}" in shown for part in ("", "_bucket", "_sum"))
    }  # fmt: skip
    assert missing == set()


def test_provisioning_names_a_prometheus_and_a_folder_of_dashboards() -> None:
    folder = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "ridgewalk.yml").read_text())["datasources"]
    interval = yaml.safe_load((MONITORING / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert (source["type"], source["jsonData"]["timeInterval"]) == ("prometheus", interval)
    (provider,) = yaml.safe_load((folder / "dashboards" / "ridgewalk.yml").read_text())["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"]
