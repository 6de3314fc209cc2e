"""What `ridgewalk plan` tells: the list for programs, the table for people, the configuration for `ridgewalk serve`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml
from rich.table import Table

from ridgewalk.placement.hardware import Device
from ridgewalk.planning.planner import Candidate
from ridgewalk.planning.shape import Placement, Shape
from ridgewalk.planning.simulator import Outcome, Scene
from ridgewalk.planning.verdict import TERMS, reason, shares
from ridgewalk.routing.latency_slo import NO_SLO, LatencySlo


def as_data(ranked: Sequence[Candidate], slo: LatencySlo = NO_SLO) -> list[dict[str, Any]]:
    """Plain data, best first; figures are null where a placement cannot be loaded. ``slo``: see `reason`."""
    return [
        {
            "name": candidate.placement.name,
            "shapes": [shape_fields(shape) for shape in candidate.placement.shapes],
            "feasible": candidate.outcome is not None,
            "reason": reason(candidate, ranked[0], slo),
            **_figures(candidate.outcome),
        }
        for candidate in ranked
    ]


def as_table(ranked: Sequence[Candidate], title: str) -> Table:
    """The figures for a terminal; placements that cannot be loaded have none."""
    table = Table(title=title, title_justify="left")
    for heading in ("placement", "seconds", "tokens/s", "TTFT p50", "TPOT p50", "KV tokens", "preempted"):
        table.add_column(heading, justify="left" if heading == "placement" else "right", no_wrap=True)
    for candidate in ranked:
        outcome = candidate.outcome
        figures = ("-",) * 6
        if outcome is not None:
            figures = (
                f"{outcome.makespan_s:,.0f}",
                f"{outcome.throughput_tokens_per_s:,.0f}",
                f"{outcome.ttft_p50_s:,.2f} s",
                f"{outcome.tpot_p50_s * 1e3:,.1f} ms",
                f"{outcome.kv_capacity_tokens:,}",
                f"{outcome.preemptions:,}",
            )
            if not candidate.simulated:
                figures = (f"over {figures[0]}", f"under {figures[1]}", "-", f"over {figures[3]}", figures[4], "-")
        table.add_row(candidate.placement.name, *figures)
    return table


def as_account(candidate: Candidate, outcome: Outcome) -> Table:
    """Where a placement's time goes."""
    title = f"{candidate.placement.name}: where its {outcome.makespan_s:,.0f} s go (mean of its replicas and stages)"
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for term, share in shares(outcome).items():
        table.add_row(TERMS[term], f"{share * outcome.makespan_s:,.1f}", f"{share:.1%}")
    return table


def as_configuration(placement: Placement, model: str, scene: Scene) -> str:
    """YAML that `ridgewalk serve -c` takes: the service that was simulated."""
    limits = {"slo_ttft_ms": scene.slo.ttft_s * 1e3, "slo_tpot_ms": scene.slo.tpot_s * 1e3}
    described = {
        "model": model,
        "max_model_len": scene.max_model_len,
        "max_num_seqs": scene.policy.max_num_seqs,
        "max_num_batched_tokens": scene.policy.max_num_batched_tokens,
        "admission": scene.policy.admission,
        "routing": scene.policy.routing or "least_loaded",  # vLLM's balancer counts requests too
        **{name: limit for name, limit in limits.items() if math.isfinite(limit)},
        "placements": [placement_fields(shape, scene.hardware.device) for shape in placement.shapes],
    }
    return yaml.safe_dump({"models": [described]}, sort_keys=False)


def placement_fields(shape: Shape, device: Device) -> dict[str, Any]:
    """A whole entry of ``placements``."""
    return {**shape_fields(shape), "gpus_per_rank": 1.0 if device == "cuda" else 0.0}


def shape_fields(shape: Shape) -> dict[str, Any]:
    """As the configuration of a placement has them."""
    return {
        "replicas": shape.replicas,
        "tensor_parallel_size": shape.mesh.tp,
        "pipeline_parallel_size": shape.mesh.pp,
        "data_parallel_size": shape.mesh.dp,
        "enable_expert_parallel": shape.mesh.expert_parallel,
    }


def _figures(outcome: Outcome | None) -> dict[str, float | int | None]:
    names = ("makespan_s", "throughput_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "kv_capacity_tokens", "preemptions",
             "recomputed_tokens")  # fmt: skip
    return {name: None if outcome is None else getattr(outcome, name) for name in names}
