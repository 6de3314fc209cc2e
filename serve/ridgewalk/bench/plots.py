"""The plots of a report, as SVG to be put into a page: text stays text, nothing is loaded from elsewhere."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ridgewalk.bench.findings import find_cliff
from ridgewalk.bench.report import Distribution, Point, Report, Series, Slo
from ridgewalk.bench.service_window import FULL

COLOURS = ("#2563eb", "#ea580c", "#0d9488", "#9333ea", "#ca8a04", "#475569")
DANGER = "#dc2626"
MUTED = "#64748b"
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#cbd5e1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.7,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "axes.labelcolor": "#475569",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 3.0,
    "lines.linewidth": 1.8,
}


def sweep_plot(reports: Sequence[tuple[str, Report]]) -> str:
    """Throughput, latencies, KV cache and preemptions against load; several reports over each other.

    With one report the loads over the capacity cliff are shaded.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "sweep"}):
        figure = Figure(figsize=(11.2, 5.9), layout="constrained")
        panels = figure.subplots(2, 3)
        labels = _loads(reports)
        single = len(reports) == 1
        for index, (name, report) in enumerate(reports):
            style = {"color": COLOURS[index], "marker": "o", "markersize": 4}
            prefix = "" if single else f"{name} "
            x = [labels.index(_load(point)) for point in report.points]
            _line(panels[0, 0], x, [p.client.output_tokens_per_s for p in report.points], prefix or "all", style)
            for axes, get in (
                (panels[0, 1], lambda p: p.client.ttft_ms),
                (panels[0, 2], lambda p: p.client.itl_ms),
            ):
                _percentiles(axes, x, [get(point) for point in report.points], prefix, style)
            _service_panels(panels[1], x, report.points, prefix, style, index, len(reports))
        for axes, title, unit in zip(
            panels.flat,
            (
                "Throughput",
                "Time to first token",
                "Inter-token latency",
                "KV cache used",
                "Preemptions",
                "What it costs",
            ),
            (
                "output tokens/s",
                "ms",
                "ms, means of requests",
                "% of blocks",
                "sequences that lost their KV",
                "% of time, tokens, step time",
            ),
            strict=True,
        ):
            axes.set_title(title)
            axes.set_ylabel(unit.strip())
            axes.set_xticks(range(len(labels)), labels)
            axes.set_xlim(-0.5, len(labels) - 0.5)
            axes.set_xlabel(_load_name(reports))
            if axes.get_legend_handles_labels()[0] and not (single and title in ("Throughput", "Preemptions")):
                axes.legend()
        panels[0, 0].set_ylim(bottom=0)
        panels[0, 2].set_ylim(bottom=0)
        panels[1, 1].set_ylim(0, 1.15 * max(1.0, *(bar.get_height() for bar in panels[1, 1].patches), 0.0))
        _log_if_wide(panels[0, 1])
        if single:
            _shade_cliff(panels.flat, reports[0][1].points)
        return _svg(figure)


def time_plot(series: Series, duration_s: float, together: bool = False) -> str:
    """KV cache, sequences and throughput over the time of one load."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "time"}):
        figure = Figure(figsize=(11.2, 5.6), layout="constrained")
        kv, sequences, tokens = figure.subplots(3, 1, sharex=True, height_ratios=(1.3, 1, 0.9))
        time = series.time_s
        for index, (replica, usage) in enumerate(zip(series.replicas, series.kv_usage, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            kv.plot(time, _line_of(usage, 100), color=colour, label=replica)
            if series.kv_fullest and series.kv_fullest[index] != usage:
                fullest = _line_of(series.kv_fullest[index], 100)
                kv.plot(time, fullest, color=colour, linestyle=":", label=f"{replica} fullest group")
            sequences.plot(time, _line_of(series.running[index]), color=colour, label=f"{replica} running")
            waiting = _line_of(series.waiting[index])
            sequences.plot(time, waiting, color=colour, linestyle=":", label=f"{replica} waiting")
        _shade_full(kv, series)
        lost = [series.preemptions[i] - series.preemptions[i - 1] for i in range(1, len(time))]
        if any(lost):
            at = [(t, n) for t, n in zip(time[1:], lost, strict=True) if n > 0]
            kv.scatter(
                [t for t, _ in at], [106.0] * len(at), s=[12 + 6 * n for _, n in at], marker="v", color=DANGER,
                label=f"preemptions ({series.preemptions[-1]:,.0f})", clip_on=False, zorder=3,
            )  # fmt: skip
        kv.axhline(100 * FULL, color=DANGER, linewidth=0.8, linestyle="--")
        kv.set(ylim=(0, 112), ylabel="% of blocks")
        kv.set_title("KV cache used")
        sequences.set(ylabel="sequences")
        sequences.set_ylim(bottom=0)
        sequences.set_title("Running and waiting")
        tokens.plot(time, series.generation_tokens_per_s, color=COLOURS[2])
        tokens.set(ylabel="tokens/s", xlabel="seconds since the first request", xlim=(0, max(duration_s, 1e-3)))
        tokens.set_ylim(bottom=0)
        tokens.set_title("Tokens generated")
        for axes in (kv, sequences):
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure)


def distribution_plot(points: Sequence[tuple[str, Point]], slo: Slo) -> str:
    """The share of requests that were faster, for each latency; several points over each other."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "distributions"}):
        figure = Figure(figsize=(11.2, 3.1), layout="constrained")
        columns: tuple[tuple[str, str, Callable[[Point], Sequence[float | None]], float | None], ...] = (
            ("Time to first token", "ms", lambda p: p.client.requests.ttft_ms, slo.ttft_ms),
            ("Inter-token latency", "ms, mean of a request", lambda p: p.client.requests.itl_ms, slo.itl_ms),
            ("Longest pause in a stream", "ms", lambda p: p.client.requests.longest_gap_ms, None),
            ("End to end", "s", lambda p: p.client.requests.e2e_s, slo.e2e_s),
        )
        for axes, (title, unit, get, limit) in zip(figure.subplots(1, 4, sharey=True), columns, strict=True):
            for index, (name, point) in enumerate(points):
                values = sorted(value for value in get(point) if value is not None)
                shares = [100 * (i + 1) / len(values) for i in range(len(values))]
                axes.plot(values, shares, color=COLOURS[index % len(COLOURS)], label=name, drawstyle="steps-post")
            if limit is not None:
                axes.axvline(limit, color=DANGER, linestyle="--", linewidth=1)
                axes.annotate("SLO", (limit, 4), color=DANGER, fontsize=8, xytext=(3, 0), textcoords="offset points")
            axes.set_title(title)
            axes.set_xlabel(unit)
            axes.set_ylim(0, 102)
            _log_if_wide(axes, horizontal=True)
        figure.axes[0].set_ylabel("% of requests")
        if len(points) > 1:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(points))
        return _svg(figure)


def lengths_plot(report: Report) -> str:
    """What the requests' lengths were, as the server counted them."""
    requests = report.points[0].client.requests
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lengths"}):
        figure = Figure(figsize=(11.2, 2.4), layout="constrained")
        for axes, title, lengths, colour in zip(
            figure.subplots(1, 2),
            ("Prompts", "Outputs"),
            (requests.input_tokens, requests.output_tokens),
            COLOURS,
            strict=False,
        ):
            axes.hist(lengths, bins=min(40, max(5, len(set(lengths)))), color=colour, alpha=0.85)
            axes.set_title(title)
            axes.set(xlabel="tokens", ylabel="requests")
            axes.set_xlim(left=0)
        return _svg(figure)


def _service_panels(
    panels: Sequence[Axes],
    x: list[int],
    points: Sequence[Point],
    prefix: str,
    style: dict[str, Any],
    index: int,
    of: int,
) -> None:
    known = [(at, point.service) for at, point in zip(x, points, strict=True) if point.service is not None]
    if not known:
        return
    at = [place for place, _ in known]
    services = [service for _, service in known]
    kv, preemptions, price = panels
    _line(kv, at, [_percent(s.kv_usage_max) for s in services], f"{prefix}at most", style)
    _line(kv, at, [_percent(s.kv_usage_mean) for s in services], f"{prefix}mean", {**style, "linestyle": "--"})
    if index == 0:
        kv.axhline(100 * FULL, color=DANGER, linewidth=0.8, linestyle=":")
    kv.set_ylim(0, 106)
    width = 0.6 / of
    places = [place - 0.3 + width * (index + 0.5) for place in at]
    bars = preemptions.bar(
        places, [s.num_preemptions for s in services], width, color=DANGER if of == 1 else style["color"],
        label=prefix.strip() or None, alpha=0.85,
    )  # fmt: skip
    preemptions.bar_label(bars, fmt="{:,.0f}", fontsize=8.5, padding=2)
    lines = [
        ("time throttled", "-", COLOURS[0], [s.throttled_share for s in services]),
        ("recompute tax", "--", DANGER, [s.recompute_tax for s in services]),
        ("collectives", "-.", COLOURS[3], [s.collective_share for s in services]),
    ]
    if of == 1:
        lines.append(("time KV full", ":", COLOURS[1], [s.kv_full_share for s in services]))
    for name, line, colour, values in lines:
        if any(value is not None for value in values):
            look = {**style, "color": colour if of == 1 else style["color"], "linestyle": line}
            _line(price, at, [_percent(value) for value in values], prefix + name, look)
    price.set_ylim(-2, 106)


def _percentiles(
    axes: Axes, x: list[int], found: Sequence[Distribution | None], prefix: str, style: dict[str, Any]
) -> None:
    _line(axes, x, [d and d.p99 for d in found], f"{prefix}p99", style)
    _line(axes, x, [d and d.p50 for d in found], f"{prefix}p50", {**style, "linestyle": "--"})


def _line(axes: Axes, x: list[int], values: Sequence[float | None], label: str, style: dict[str, Any]) -> None:
    known = [(place, value) for place, value in zip(x, values, strict=True) if value is not None]
    axes.plot([place for place, _ in known], [value for _, value in known], label=label, **style)


def _shade_cliff(panels: Sequence[Axes], points: Sequence[Point]) -> None:
    cliff = find_cliff(points)
    if cliff is None:
        return
    for number, axes in enumerate(panels):
        axes.axvspan(cliff - 0.5, len(points) - 0.5, color=DANGER, alpha=0.07, linewidth=0)
        if number == 0:
            axes.annotate(
                "over the capacity cliff",
                (cliff - 0.45, 0.03),
                xycoords=("data", "axes fraction"),
                color=DANGER,
                fontsize=8.5,
            )


def _shade_full(axes: Axes, series: Series) -> None:
    rows = zip(*(series.kv_fullest or series.kv_usage), strict=True)
    full = [max((value for value in row if value is not None), default=0.0) >= FULL for row in rows]
    for i in range(1, len(full)):
        if full[i]:
            axes.axvspan(series.time_s[i - 1], series.time_s[i], color=DANGER, alpha=0.08, linewidth=0)


def _log_if_wide(axes: Axes, horizontal: bool = False) -> None:
    """A logarithmic scale where the values span over a factor of twenty."""
    lines = [line.get_xdata() if horizontal else line.get_ydata() for line in axes.get_lines()]
    values = [float(value) for data in lines for value in data if float(value) > 0]
    if not values or max(values) <= 20 * min(values):
        if not horizontal:
            axes.set_ylim(bottom=0)
        return
    (axes.set_xscale if horizontal else axes.set_yscale)("log")
    axis = axes.xaxis if horizontal else axes.yaxis
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def _loads(reports: Sequence[tuple[str, Report]]) -> list[str]:
    points = {_load(point): point for _, report in reports for point in report.points}
    return sorted(points, key=lambda load: (points[load].concurrency or 0, points[load].rate or 0.0))


def _load(point: Point) -> str:
    if point.concurrency is not None:
        return str(point.concurrency)
    return f"{point.rate:g}/s" if point.rate is not None else point.label


def _load_name(reports: Sequence[tuple[str, Report]]) -> str:
    return "concurrency" if reports[0][1].points[0].concurrency is not None else "load"


def _line_of(values: Sequence[float | None], factor: float = 1.0) -> list[float]:
    """With a gap where a sample has no value."""
    return [math.nan if value is None else factor * value for value in values]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration and the DTD's address
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids are the page's: plots of one shape would share them, and a clip path in a closed <details> clips nothing.
    own = hashlib.sha256(text.encode()).hexdigest()[:10]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    )
