"""One HTML file that shows a report, or two side by side; it loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from ridgewalk.bench.figures import CLIENT, SERVICE, Figure, count, milliseconds, percent, seconds
from ridgewalk.bench.findings import find_cliff
from ridgewalk.bench.plots import distribution_plot, lengths_plot, sweep_plot, time_plot
from ridgewalk.bench.report import Point, Report, Service, Slo

CSS = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;margin:0}
body{color:#0f172a;background:#f8fafc}
main{max-width:1120px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:25px;margin:0 0 4px}h2{font-size:18px;margin:34px 0 10px}h3{font-size:15px;margin:22px 0 6px}
.sub{color:#475569;margin:0 0 18px}
.findings{background:#fff;border:1px solid #e2e8f0;border-left:5px solid #2563eb}
.findings{border-radius:8px;padding:14px 20px;margin:0}
.findings.cliff{border-left-color:#dc2626}
.findings p{margin:5px 0}.findings p:first-child{font-size:18px;font-weight:600;line-height:1.4}
.card{background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:12px 16px;margin:10px 0;overflow-x:auto}
.card svg{display:block;max-width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid #eef2f7;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal}
thead th{color:#475569;font-weight:600;border-bottom:2px solid #cbd5e1}
td small{color:#64748b;display:block;font-size:12px}
.over{background:#fef2f2}.better{color:#047857;font-weight:600}.worse{color:#b91c1c;font-weight:600}
details{background:#fff;border:1px solid #e2e8f0;border-radius:8px;margin:10px 0;padding:8px 16px}
summary{cursor:pointer;font-weight:600}
footer,.notes{color:#64748b;font-size:13px}
"""


def report_page(report: Report) -> str:
    """The page of one report."""
    points = report.points
    workload, target = report.workload, report.target
    title = f"{target.model} under {workload.name} load"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=sub>{escape(_subtitle(report))}</p>",
        _findings(report.findings, find_cliff(points) is not None),
    ]
    if len(points) > 1:
        body += ["<h2>Against load</h2>", _card(sweep_plot([("", report)]))]
    else:
        body += _over_time(points[0])
    body += ["<h2>What clients saw</h2>", _table(CLIENT, points)]
    if any(point.service is not None for point in points):
        body += ["<h2>What the service measured meanwhile</h2>", _table(SERVICE, points)]
        body += [_replica_table(point) for point in points if point.service and len(point.service.replicas) > 1]
    body += ["<h2>Distributions over requests</h2>"]
    body += [_card(distribution_plot([(point.label, point) for point in points], report.slo))]
    body += ["<h2>What was asked</h2>", _card(lengths_plot(report)), _asked(report)]
    if len(points) > 1:
        body += ["<h2>Over time, load by load</h2>"]
        for number, point in enumerate(points):
            opened = " open" if number == len(points) - 1 else ""
            body.append(
                f"<details{opened}><summary>{escape(point.label)}</summary>{''.join(_over_time(point))}</details>"
            )
    body.append(_footer(report))
    return _page(title, body)


def compare_page(first: Report, second: Report, names: tuple[str, str]) -> str:
    """The page that draws two reports side by side: A and B, and B / A."""
    named = (("A", first), ("B", second))
    body = ["<h1>Two runs side by side</h1>"]
    body += [
        f"<p class=sub><b>{letter}</b> {escape(name)}: {escape(report.target.model)}, {escape(_subtitle(report))}</p>"
        for (letter, report), name in zip(named, names, strict=True)
    ]
    body.append(_findings(compare_findings(first, second), False))
    if len(first.points) > 1 or len(second.points) > 1:
        body += ["<h2>Against load</h2>", _card(sweep_plot(named))]
    pairs = common_points(first, second)
    for a, b in pairs:
        where = f" at {a.label}" if a.label == b.label else f": A at {a.label}, B at {b.label}"
        body.append(f"<h2>{escape('Figures' + where)}</h2>")
        figures = (*CLIENT, *(SERVICE if a.service is not None or b.service is not None else ()))
        body.append(_ratio_table(figures, a, b))
        slo = first.slo if first.slo == second.slo else Slo()  # one line cannot be the limit of both
        body.append(_card(distribution_plot([("A", a), ("B", b)], slo)))
    for (letter, report), name in zip(named, names, strict=True):
        body.append(f"<h2>{letter}: {escape(name)}</h2>")
        body.append(_findings(report.findings, find_cliff(report.points) is not None))
        for point in report.points[-1:]:
            if point.service is not None:
                body.append(f"<h3>Over time, {escape(point.label)}</h3>")
                body += _over_time(point)
    body.append(_footer(second))
    return _page("Two runs side by side", body)


def common_points(first: Report, second: Report) -> list[tuple[Point, Point]]:
    """Points of the same load; of two single points whichever loads they are."""
    by_label = {point.label: point for point in second.points}
    pairs = [(point, by_label[point.label]) for point in first.points if point.label in by_label]
    if not pairs and len(first.points) == len(second.points) == 1:
        return [(first.points[0], second.points[0])]
    return pairs


def compare_findings(first: Report, second: Report) -> list[str]:
    """Sentences about the difference."""
    said = []
    for a, b in common_points(first, second)[-1:]:
        sentence = (
            f"At {b.label} B writes {count(b.client.output_tokens_per_s)} tokens/s and A "
            f"{count(a.client.output_tokens_per_s)}"
        )
        if a.client.output_tokens_per_s:
            sentence += f": {b.client.output_tokens_per_s / a.client.output_tokens_per_s:.2f} times as many"
        said.append(sentence + ".")
        if a.client.itl_ms is not None and b.client.itl_ms is not None:
            said.append(
                f"Inter-token latency (p50 of the requests' means) is {milliseconds(b.client.itl_ms.p50)} in B and "
                f"{milliseconds(a.client.itl_ms.p50)} in A."
            )
        if a.service is not None and b.service is not None:
            said.append(
                f"B preempted {count(b.service.num_preemptions)} sequences and A {count(a.service.num_preemptions)}; "
                f"in collectives B spent {_collectives(b.service)} of its step time and A {_collectives(a.service)}."
            )
    if not said:
        said.append("The runs have no load in common; the curves are over each other, each at its own loads.")
    asked = zip(_asks(first).items(), _asks(second).values(), strict=True)
    if different := [name for (name, a), b in asked if a != b]:
        said.append(
            f"The runs did not ask the same: they differ in {_listed(different)}, so that their figures are of "
            "different loads."
        )
    if first.slo != second.slo:
        said.append(
            f"The runs were held to different SLOs (A: {_limits(first.slo)}; B: {_limits(second.slo)}): their goodput "
            "and shares within the SLO cannot be compared."
        )
    return said


def _collectives(service: Service) -> str:
    return "nothing" if service.collective_share is None else percent(service.collective_share)


def _asks(report: Report) -> dict[str, object]:
    workload = report.workload
    return {
        "profile or trace": workload.name,
        "scale": workload.scale,
        "seed": workload.seed,
        "number of requests": workload.num_requests,
        "lengths of prompts": workload.input_length,
        "lengths of outputs": workload.output_length,
        "whether outputs end where the model ends them": workload.lengths_forced,
    }


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _subtitle(report: Report) -> str:
    target, workload = report.target, report.workload
    parts = [
        f"placement {target.placement}" if target.placement else "",
        f"{target.url}",
        f"{workload.num_requests} requests a load, lengths at scale {workload.scale:g}",
        f"seed {workload.seed}",
        report.created.replace("T", " ").removesuffix("+00:00") + " UTC",
    ]
    return " · ".join(part for part in parts if part)


def _findings(sentences: Sequence[str], over_cliff: bool) -> str:
    lines = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="findings{" cliff" if over_cliff else ""}">{lines}</div>'


def _card(content: str) -> str:
    return f"<div class=card>{content}</div>"


def _over_time(point: Point) -> list[str]:
    if point.service is None:
        return []
    return [_card(time_plot(point.service.series, point.client.duration_s))]


def _table(figures: Sequence[Figure], points: Sequence[Point]) -> str:
    cliff = find_cliff(points)
    over = [cliff is not None and number >= cliff and len(points) > 1 for number in range(len(points))]
    head = "".join(f"<th{_over(o)}>{escape(point.label)}</th>" for point, o in zip(points, over, strict=True))
    rows = []
    for figure in figures:
        values = [figure.value(point) for point in points]
        if all(value is None for value in values):
            continue
        cells = "".join(
            f"<td{_over(o)}>{'–' if value is None else escape(figure.write(value))}</td>"
            for value, o in zip(values, over, strict=True)
        )
        rows.append(f"<tr><td>{_label(figure)}</td>{cells}</tr>")
    return _card(f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def _ratio_table(figures: Sequence[Figure], a: Point, b: Point) -> str:
    rows = []
    for figure in figures:
        values = (figure.value(a), figure.value(b))
        if values == (None, None):
            continue
        cells = "".join(_cell(value, figure.write) for value in values)
        rows.append(f"<tr><td>{_label(figure)}</td>{cells}{_ratio(figure, *values)}</tr>")
    head = "<th></th><th>A</th><th>B</th><th>B / A</th>"
    return _card(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def _ratio(figure: Figure, a: float | None, b: float | None) -> str:
    if a is None or b is None or a == b == 0:
        return "<td>–</td>"
    verdict = ""
    if figure.better is not None and abs(b - a) >= 0.05 * abs(a):
        verdict = " class=better" if (b > a) == (figure.better == "higher") else " class=worse"
    said = f"{b / a:.2f}" if a else f"{escape(figure.write(a))} → {escape(figure.write(b))}"  # no ratio to nothing
    return f"<td{verdict}>{said}</td>"


def _replica_table(point: Point) -> str:
    assert point.service is not None
    head = (
        "<th>{}</th><th>KV mean</th><th>KV at most</th><th>KV full</th><th>running at most</th><th>waiting at most</th>"
    )
    head += "<th>preemptions</th><th>recomputed</th><th>throttled</th>"
    rows = "".join(
        f"<tr><td>{escape(r.name)}</td>{_cell(r.kv_usage_mean, percent)}{_cell(r.kv_usage_max, percent)}"
        f"{_cell(r.kv_full_share, percent)}{_cell(r.running_max, count)}{_cell(r.waiting_max, count)}"
        f"<td>{count(r.num_preemptions)}</td><td>{count(r.recomputed_tokens)}</td><td>{seconds(r.throttled_s)}</td></tr>"
        for r in point.service.replicas
    )
    title = f"replica, {escape(point.label)}"
    return _card(f"<table><thead><tr>{head.format(title)}</tr></thead><tbody>{rows}</tbody></table>")


def _cell(value: float | None, write: Callable[[float], str]) -> str:
    return f"<td>{'–' if value is None else escape(write(value))}</td>"


def _label(figure: Figure) -> str:
    hint = f"<small>{escape(figure.hint)}</small>" if figure.hint else ""
    return escape(figure.label) + hint


def _over(over: bool) -> str:
    return " class=over" if over else ""


def _asked(report: Report) -> str:
    workload = report.workload
    lengths = (
        f"prompts of {count(workload.input_length.p50)} tokens (p50) to {count(workload.input_length.max)}, outputs of "
        f"{count(workload.output_length.p50)} to {count(workload.output_length.max)}"
    )
    forced = (
        "End of sequence was ignored, so that every output has the length asked for."
        if workload.lengths_forced
        else "Outputs end where the model ends them; the lengths asked for are their limits."
    )
    return (
        f"<p class=notes>{escape(workload.name)}: {escape(workload.about)}. At scale {workload.scale:g}: {lengths}. "
        f"{forced} {escape(_slo(report.slo))}</p>"
    )


def _slo(slo: Slo) -> str:
    return f"SLO: {_limits(slo)}." if slo != Slo() else ""


def _limits(slo: Slo) -> str:
    limits = []
    if slo.ttft_ms is not None:
        limits.append(f"time to first token within {milliseconds(slo.ttft_ms)}")
    if slo.itl_ms is not None:
        limits.append(f"mean inter-token latency within {milliseconds(slo.itl_ms)}")
    if slo.e2e_s is not None:
        limits.append(f"end to end within {seconds(slo.e2e_s)}")
    return ", ".join(limits) or "none"


def _footer(report: Report) -> str:
    by = f"ridgewalk bench {escape(report.ridgewalk_version)}, aiperf {escape(report.aiperf_version)}"
    return (
        f"<footer><p>{by}. Client: aiperf's record of each request. Service: /metrics, scraped about once a second; "
        "counters between the scrapes around the load (the service was warm and idle before it), gauges over those "
        "within. Percentiles are nearest-rank; those of inter-token latency are over the means of requests. "
        "On one machine client and service share the cores.</p></footer>"
    )


def _page(title: str, body: Sequence[str]) -> str:
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        f'<meta name=viewport content="width=device-width"><style>{CSS}</style></head><body><main>\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )
