"""From figures to the hardware file: every constant with how it was measured beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import msgspec

from ridgewalk.calibration import collective_probes, engine_probe, kernel_probes
from ridgewalk.calibration.figures import CollectiveRates, KernelRates, Overheads, RankFigures
from ridgewalk.placement.cost_model import expert_stretch
from ridgewalk.placement.hardware import HardwareSpec, Link, RankRates

NO_OVERHEADS = Overheads(0.0, 0.0, 0.0)

HOW: Mapping[str, str] = {
    "devices_per_node": "cores; each is a device, and a rank alone on the machine has them all as threads",
    "memory_bytes": "bytes; the machine's, divided by its cores",
    "memory_bandwidth": "bytes/s of weights that one rank reads while all do: products of one row, whose "
    f"{kernel_probes.COLD_BYTES >> 20} MiB of weights, of all ranks together, no cache holds",
    "flops": f"FLOP/s of one rank by dtype, while all compute: {2 * kernel_probes.SIDE} x {kernel_probes.SIDE} weights "
    "times the number of rows that is fastest",
    "product_shares": "of flops, reached with so many rows; weights are read from memory each time",
    "expert_flops": f"FLOP/s of up to {kernel_probes.EXPERTS} experts, by dtype and rows of each, while all compute: "
    f"hidden {kernel_probes.EXPERT_HIDDEN}, {kernel_probes.EXPERT_INNER} inner columns, without what expert_fill takes",
    "expert_fill": "input columns whose time each product of an expert takes beside its own: by how much experts of "
    f"{kernel_probes.EXPERT_INNER // kernel_probes.SLICES} inner columns are slower, the mean over dtypes and "
    f"{' and '.join(map(str, kernel_probes.SLICED_ROWS))} rows",
    "attention_bandwidth": "bytes/s of KV that one rank reads in decode, while all do, by query heads per KV head: "
    f"{kernel_probes.SEQUENCES} sequences of {kernel_probes.CONTEXT} tokens, {kernel_probes.KV_HEADS} KV heads of "
    f"{kernel_probes.HEAD_DIM}",
    "attention_flops": f"FLOP/s of attention of {kernel_probes.PROMPTS} prompts of {kernel_probes.PROMPT} tokens",
    "latent_attention_flops": f"FLOP/s of decode over latents: {kernel_probes.LATENT_HEADS} heads, "
    f"{kernel_probes.SEQUENCES} sequences of {kernel_probes.CONTEXT} tokens, {kernel_probes.LATENT_DIM} wide",
    "within_node": "seconds, bytes/s of an all-reduce among all ranks: of "
    f"{collective_probes.FEW_BYTES >> 10} KiB, and what {collective_probes.MANY_BYTES >> 10} KiB take beyond it, "
    "counted as 2 (n - 1) / n of them; in latency_s also what an all-reduce takes longer in decode steps of small "
    "models than alone, as ranks wait for each other",
    "all_to_all": "the same of an all-to-all in equal parts, counted as (n - 1) / n; in latency_s also what dispatch "
    "and combine take longer in decode steps of a small sparse model, sorting of rows by rank included",
    "straggle": "of what ranks compute between two collectives, by how much the last is behind a rank alone, in the "
    "mean: products of 32 rows with an all-reduce after each",
    "bandwidth_efficiency": "rates are those reached: medians over the turns, slower by what calls of all kinds take "
    "longer in the mean than in the median, as cores are taken away now and then",
    "flops_efficiency": "likewise",
    "link_efficiency": "links are those measured: medians over the turns, and what collectives take longer in steps",
    "stage_overhead_s": "seconds; as an exchange of few bytes, for stages hand over through the same memory",
    "value_overhead_s": "seconds of a layer for each value of a token's hidden state: two norms, rotation, activation, "
    f"of {kernel_probes.TOKENS} tokens of {kernel_probes.SIDE}",
    "layer_overhead_s": "seconds of a layer in a step; this and the next two are what decode steps of small models "
    f"({engine_probe.PROMPT} prompt tokens, hidden {engine_probe.HIDDEN}) take beyond all of the above, each rank a "
    "replica, with schedulers and ranks in processes of their own",
    "step_overhead_s": "seconds of a step",
    "sequence_overhead_s": f"seconds of each sequence of a step, sampling from {engine_probe.VOCABULARY:,} included",
    "sparse_layer_overhead_s": "seconds that a layer takes more if tokens choose experts: what decode steps of a small "
    f"sparse model take beyond all of the above, {engine_probe.EXPERTS_PER_TOKEN} experts a token",
    "host_shares_cores": "scheduler and ranks have the same cores",
    "memory_share": "of the memory, for all ranks: what `ridgewalk serve` takes by default",
    "process_bytes": "bytes of a rank's process before it holds anything of a model",
    "by_ranks": "the same for a rank while so many have the machine, and share out its cores as threads",
}
"""How each constant was measured, in the order of the file."""


def rank_rates(figures: Sequence[RankFigures], overheads: Overheads) -> RankRates:
    """Of one rank of a team: the mean over its ranks."""
    dtypes = {
        dtype: [rank.kernels[dtype] for rank in figures] for dtype in figures[0].kernels
    }  # fmt: skip
    expert_flops, fill = _experts(dtypes)
    by_rows = {dtype: _mean([rank.product_flops for rank in ranks]) for dtype, ranks in dtypes.items()}
    return RankRates(
        memory_bandwidth=max(fmean(rank.weight_bandwidth for rank in ranks) for ranks in dtypes.values()),
        flops={dtype: max(rates.values()) for dtype, rates in by_rows.items()},
        product_shares={
            dtype: {rows: rate / max(rates.values()) for rows, rate in rates.items()}
            for dtype, rates in by_rows.items()
        },
        expert_flops=expert_flops,
        expert_fill=fill,
        attention_bandwidth={
            dtype: _mean([rank.attention_bandwidth for rank in ranks]) for dtype, ranks in dtypes.items()
        },
        attention_flops={dtype: fmean(rank.attention_flops for rank in ranks) for dtype, ranks in dtypes.items()},
        latent_attention_flops={
            dtype: fmean(rank.latent_attention_flops for rank in ranks) for dtype, ranks in dtypes.items()
        },
        layer_overhead_s=overheads.layer_s,
        value_overhead_s=fmean(rank.value_s for ranks in dtypes.values() for rank in ranks),
        sparse_layer_overhead_s=0.0,
        step_overhead_s=overheads.step_s,
        sequence_overhead_s=overheads.sequence_s,
    )


def _experts(dtypes: Mapping[str, Sequence[KernelRates]]) -> tuple[dict[str, dict[int, float]], float]:
    """`HardwareSpec.expert_flops` and `expert_fill`: what slices are slower by, the mean over dtypes and rows."""
    whole = {dtype: _mean([rank.expert_flops for rank in ranks]) for dtype, ranks in dtypes.items()}
    sliced = {dtype: _mean([rank.sliced_expert_flops for rank in ranks]) for dtype, ranks in dtypes.items()}
    fill = expert_fill(fmean(whole[dtype][rows] / rate for dtype in sliced for rows, rate in sliced[dtype].items()))
    own = expert_stretch(fill, kernel_probes.EXPERT_HIDDEN, kernel_probes.EXPERT_INNER)
    return {dtype: {rows: rate * own for rows, rate in rates.items()} for dtype, rates in whole.items()}, fill


def expert_fill(slower: float) -> float:
    """Input columns whose time each product of an expert takes beside its own.

    Args:
        slower: FLOP/s of the probe's experts over those of its slices. A fill f makes experts take 1 + a f, and their
            slices 1 + b f; limited to midway between no fill and nothing but fill.
    """
    hidden, inner = kernel_probes.EXPERT_HIDDEN, kernel_probes.EXPERT_INNER
    a, b = expert_stretch(1.0, hidden, inner) - 1, expert_stretch(1.0, hidden, inner / kernel_probes.SLICES) - 1
    slower = min(slower, (1 + b / a) / 2)
    return max(0.0, (slower - 1) / (b - slower * a))


def _mean(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """At each size; all have the same."""
    return {size: fmean(curve[size] for curve in curves) for size in curves[0]}


def hardware_spec(
    about: str,
    memory_bytes: int,
    memory_share: float,
    process_bytes: int,
    rates: Mapping[int, RankRates],
    collectives: Sequence[CollectiveRates],
) -> HardwareSpec:
    """The machine: as many devices as the greatest number of ranks, whose rates are its own."""
    most = max(rates)
    link = exchange = None
    if collectives:
        link = Link(
            fmean(each.all_reduce_latency_s for each in collectives),
            fmean(each.all_reduce_bandwidth for each in collectives),
        )
        exchange = Link(
            fmean(each.all_to_all_latency_s for each in collectives),
            fmean(each.all_to_all_bandwidth for each in collectives),
        )
    return HardwareSpec(
        about=about,
        devices_per_node=most,
        memory_bytes=memory_bytes / most,
        within_node=link,
        all_to_all=exchange,
        bandwidth_efficiency=1.0,
        flops_efficiency=1.0,
        link_efficiency=1.0,
        stage_overhead_s=link.latency_s if link else 0.0,
        straggle=max(0.0, fmean(each.straggle for each in collectives)) if collectives else 0.0,
        device="cpu",
        host_shares_cores=True,
        memory_share=memory_share,
        process_bytes=process_bytes,
        by_ranks={count: each for count, each in rates.items() if count < most},
        **msgspec.structs.asdict(rates[most]),
    )


def with_waits(hardware: HardwareSpec, all_reduce_s: float, all_to_all_s: float) -> HardwareSpec:
    """Collectives take so much longer within steps."""
    waits, links = {"within_node": all_reduce_s, "all_to_all": all_to_all_s}, {}
    for name, wait_s in waits.items():
        link = getattr(hardware, name)
        links[name] = None if link is None else msgspec.structs.replace(link, latency_s=link.latency_s + wait_s)
    return msgspec.structs.replace(hardware, **links)


def as_yaml(hardware: HardwareSpec, note: str) -> str:
    """The file, with a comment on every constant; ``note`` is its first line."""
    fields = msgspec.to_builtins(hardware)
    lines = [f"# {note}", f"about: {_scalar(fields['about'])}", "device: cpu"]
    for name, how in HOW.items():
        lines += _entry(name, fields[name], how)
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any, how: str) -> list[str]:
    lines = [f"# {how}"]
    if name != "by_ranks" or not value:
        return [*lines, f"{name}: {_scalar(value)}"]
    lines.append("by_ranks:")
    for count, rates in value.items():
        lines.append(f"  {count}:")
        lines += [f"    {field}: {_scalar(each)}" for field, each in rates.items()]
    return lines


def _scalar(value: Any) -> str:
    """In YAML's flow style; figures to four digits. An exponent has its sign and a point: YAML 1.1 wants both."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_scalar(each)}" for key, each in value.items()) + "}"
    if isinstance(value, float):
        mantissa, exponent = f"{value:.4g}".partition("e")[::2]
        return f"{mantissa}{'' if '.' in mantissa else '.0'}{'e' * bool(exponent)}{exponent}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else msgspec.json.encode(value).decode()
