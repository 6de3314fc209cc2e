"""Draws a dashboard's graphs from a real Prometheus: ``python -m monitoring.grafana.picture kv http://... kv.svg``.

For documents, and where there is no Grafana: the queries, units and thresholds are those of the dashboard.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, PercentFormatter

from monitoring.grafana.board import Board
from monitoring.grafana.generate import BOARDS
from monitoring.grafana.panel import SHARE, Panel, Query

COLUMNS = 3
POINTS = 200  # of a series
MOST_SERIES = 8  # of a panel: the others would hide each other


@dataclass(frozen=True)
class Window:
    """What part of the past to draw, in seconds since the epoch, and over how much of it rates are taken."""

    start: float
    end: float
    rate: str = "10s"

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return max(1.0, (self.end - self.start) / POINTS)


@dataclass(frozen=True)
class Line:
    """One series: seconds since the window's start, and values."""

    legend: str
    times: list[float]
    values: list[float]


def read_lines(prometheus: str, query: Query, window: Window) -> list[Line]:
    """A query's series with every variable of the dashboard set to all.

    Raises:
        httpx.HTTPError: Prometheus does not answer, or refuses the query.
    """
    expr = query.expr.replace("$__rate_interval", window.rate)
    expr = re.sub(r"\$(model_name|placement)", ".*", expr)
    body = {"query": expr, "start": str(window.start), "end": str(window.end), "step": str(window.step)}
    reply = httpx.post(f"{prometheus}/api/v1/query_range", data=body, timeout=30).raise_for_status().json()
    lines = []
    for series in reply["data"]["result"]:
        points = [(at - window.start, float(value)) for at, value in series["values"] if value != "NaN"]
        if points:
            times, values = zip(*points, strict=True)
            lines.append(Line(_legend(query.legend, series["metric"]), list(times), list(values)))
    return sorted(lines, key=lambda line: line.legend)


def draw(title: str, panels: Sequence[Panel], prometheus: str, window: Window) -> Figure:
    """Graphs of ``panels``, in rows of `COLUMNS`."""
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 2.9 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontweight="bold", x=0.01, ha="left")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, [line for query in panel.queries for line in read_lines(prometheus, query, window)])
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def _draw_panel(axis: Axes, panel: Panel, lines: list[Line]) -> None:
    shown = sorted(lines, key=lambda line: max(line.values), reverse=True)[:MOST_SERIES]
    shown.sort(key=lambda line: line.legend)
    for line in shown:
        axis.plot(line.times, line.values, linewidth=1.2, label=line.legend)
    top = max((max(line.values) for line in shown), default=1.0)
    for limit, color in zip(panel.limits or (), ("#d99a00", "#c4162a"), strict=False):
        if limit <= max(top * 1.5, panel.maximum or 0):
            axis.axhline(limit, color=color, linewidth=0.8, linestyle="--")
    left_out = len(lines) - len(shown)
    axis.set_title(panel.title + (f" ({left_out} lower series left out)" if left_out else ""), fontsize=9, loc="left")
    axis.set_ylim(0, panel.maximum * 1.05 if panel.maximum else None)
    axis.yaxis.set_major_formatter(_formatter(panel.unit))
    axis.set_xlabel("seconds", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if shown:
        axis.legend(fontsize=6, frameon=False, loc="upper left")
    else:
        axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes, fontsize=8)


def _formatter(unit: str) -> Formatter:
    if unit == SHARE:
        return PercentFormatter(1.0, decimals=None)
    noun = {"s": " s", "bytes": "B", "Bps": "B/s", "none": ""}.get(unit, "")
    if unit == "s":
        return FuncFormatter(lambda value, _: f"{value * 1e3:g} ms" if value < 1 else f"{value:g} s")
    return FuncFormatter(lambda value, _: _scaled(value) + noun)


def _scaled(value: float) -> str:
    for factor, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"


def _legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), template)


def graphs_of(board: Board) -> list[Panel]:
    """The panels that are drawn; numbers and tables are not."""
    return [panel for row in board.rows for panel in row.panels if panel.kind == "graph"]


def main() -> None:
    """See the module."""
    boards = {board.uid.removeprefix("ridgewalk-"): board for board in BOARDS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("board", choices=sorted(boards))
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("out", help="an .svg or .png file")
    parser.add_argument("--minutes", type=float, default=5.0, help="how far back")
    parser.add_argument("--panels", nargs="*", default=[], metavar="TITLE", help="only these")
    arguments = parser.parse_args()
    board = boards[arguments.board]
    graphs = graphs_of(board)
    if unknown := set(arguments.panels) - {panel.title for panel in graphs}:
        parser.error(f"no graph of {board.title} is called {', '.join(sorted(unknown))}")
    now = time.time()
    chosen = [panel for panel in graphs if not arguments.panels or panel.title in arguments.panels]
    mpl.rcParams["svg.hashsalt"] = "ridgewalk"
    figure = draw(board.title, chosen, arguments.prometheus, Window(now - arguments.minutes * 60, now))
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
