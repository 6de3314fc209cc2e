"""The demo's last word: one column a model."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ridgewalk.launch.demo_load import DemoLoad, ModelLoad
from ridgewalk.load.percentile import percentile
from ridgewalk.load.scrape import Scrape

COLLECTIVES = (("all_reduce", "all-reduce"), ("dispatch", "dispatch of tokens to experts"), ("combine", "combine"))


def load_table(load: DemoLoad, placements: Mapping[str, str]) -> Table:
    """What the clients saw and what the service measured meanwhile; ``placements`` names each model's."""
    table = Table(title="what clients saw, and what the service measured meanwhile")
    table.add_column()
    columns = []
    for model, result in load.models.items():
        table.add_column(f"{model}\n{placements[model]}")
        columns.append({**_clients(result), **_service(model, result, load.window, load.last)})
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "-") for column in columns))
    return table


def _clients(result: ModelLoad) -> dict[str, str]:
    tokens = sum(answer.completion_tokens for answer in result.answers)
    first = [answer.time_to_first_token for answer in result.answers]
    gaps = [gap for answer in result.answers for gap in answer.gaps]
    rows = {
        "right answers": f"{result.num_right} of {result.num_questions}",
        "tokens/s": f"{tokens / result.seconds:,.0f} ({tokens:,} in {result.seconds:.1f} s)",
    }
    if gaps:
        rows["time to first token, p50 / p99"] = _percentiles(first)
        rows["inter-token latency, p50 / p99"] = _percentiles(gaps)
    return rows


def _service(model: str, result: ModelLoad, window: Scrape, last: Scrape) -> dict[str, str]:
    def grown(name: str) -> float:
        return window.total(f"ridgewalk_{name}", model_name=model)

    rows = {"KV cache used, at most": f"{result.peak_kv_usage:.0%}"}
    if result.fragmentation:
        mean = sum(result.fragmentation) / len(result.fragmentation)
        rows["KV internal fragmentation, mean"] = f"{mean:.1%}"
    rows["preemptions"] = f"{grown('num_preemptions_total'):.0f}"
    rows["tokens recomputed"] = f"{grown('recomputed_tokens_total'):.0f}"
    rows["throttled for want of KV"] = f"{grown('kv_throttled_seconds_total'):.1f} s"
    for op, label in COLLECTIVES:
        means = [
            window.mean("ridgewalk_collective_seconds", model_name=model, op=op, phase=phase)
            for phase in ("wait", "transfer")
        ]
        if None not in means:
            rows[f"{label}, wait / transfer"] = " / ".join(f"{(mean or 0.0) * 1e6:.0f} us" for mean in means)
    imbalance = last.total("ridgewalk_expert_load_imbalance", model_name=model, scope="worst")
    if imbalance:
        rows["busiest rank's experts / mean"] = f"{imbalance:.2f} in the worst layer"
    return rows


def _percentiles(seconds: list[float]) -> str:
    return " / ".join(f"{percentile(seconds, share) * 1e3:.0f} ms" for share in (0.5, 0.99))
