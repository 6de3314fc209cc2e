"""`ridgewalk plan` on the command line. Only the flags: every command imports this file, and a plan needs much more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

LOAD, CHOICE, OUTPUT = "Load", "Choice", "Output"


def plan(
    model: Annotated[str, typer.Option(help="A shipped shape (llama-3.1-8b), a zoo name, a folder or a hub id.")],
    hardware: Annotated[
        str, typer.Option(help="8xh200, 2x8xh200 (nodes x devices x kind), this-machine, or a .yaml file.")
    ],
    workload: Annotated[
        str,
        typer.Option(
            rich_help_panel=LOAD,
            help="chat, reasoning, long-prompt, a .yaml of lengths, a .jsonl trace, a service's URL.",
        ),
    ] = "reasoning",
    requests: Annotated[
        int | None,
        typer.Option(rich_help_panel=LOAD, help="All at once unless --rate. Default: 2000, or 500."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(rich_help_panel=LOAD, help="Requests a second, Poisson arrivals.")
    ] = None,
    seed: Annotated[int, typer.Option(rich_help_panel=LOAD, help="The same seed plans for the very same load.")] = 0,
    policy: Annotated[
        str, typer.Option(rich_help_panel=CHOICE, help="Limits, admission and routing: vllm, ridgewalk.")
    ] = "vllm",
    objective: Annotated[
        str, typer.Option(rich_help_panel=CHOICE, help="throughput, or goodput: requests within --ttft and --tpot.")
    ] = "throughput",
    ttft: Annotated[
        str | None, typer.Option(rich_help_panel=CHOICE, help="Longest time to first token, as 500ms or 2s.")
    ] = None,
    tpot: Annotated[
        str | None, typer.Option(rich_help_panel=CHOICE, help="Longest mean time per further token, as 50ms.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(rich_help_panel=CHOICE, help="Only these: TP8,DP4xTP2,PP2xTP4,DP8xEP8,DP4+TP4.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=OUTPUT, help="A JSON list, best first, and nothing else.")
    ] = False,
    explain: Annotated[
        str | None, typer.Option(rich_help_panel=OUTPUT, help="Show where the time of this placement goes.")
    ] = None,
    emit: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(rich_help_panel=OUTPUT, help="Write the best as a configuration for `ridgewalk serve -c`."),
    ] = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(rich_help_panel=OUTPUT, help="Draw throughput against TPOT of all (.png, .svg, .pdf)."),
    ] = None,
) -> None:
    """Rank the placements of a model on hardware under a load, by simulation, with the reason of each verdict."""
    from ridgewalk.planning.run import run_plan

    run_plan(
        model,
        hardware,
        workload,
        requests,
        rate,
        seed,
        policy,
        objective,
        ttft,
        tpot,
        only,
        as_json,
        explain,
        emit,
        plot,
    )
