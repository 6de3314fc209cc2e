"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console
from rich.markup import escape

from ridgewalk import __version__
from ridgewalk.bench.command import bench
from ridgewalk.calibration.command import calibrate
from ridgewalk.config import ConfigError, ModelConfig, PlacementConfig, ServeConfig, load_config, parse_config
from ridgewalk.flags import in_flags
from ridgewalk.planning.command import plan

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
ENGINE, PLACEMENT, SERVICE = "Engine", "Placement", "Service"
app.command()(bench)
app.command()(plan)
app.command()(calibrate)
_FIELDS = {"api_key": "api_keys", "served_model_name": "name"}  # of flags that are called otherwise


def main() -> None:
    """Console script. User errors are one sentence on standard error and exit status 2."""
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)


def _fail(error: Exception, status: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False)
    raise SystemExit(status) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Serve reasoning LLMs on a Ray cluster."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[Optional[str], typer.Argument(help="A zoo name (demo-dense), a folder or a hub id.")] = None,  # noqa: UP045
    config: Annotated[
        Path | None,
        typer.Option("-c", "--config", help="A YAML file instead of MODEL and its flags; those of Service go before."),
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option("--tensor-parallel-size", "-tp", rich_help_panel=PLACEMENT, help="Ranks that share each layer."),
    ] = 1,
    pipeline_parallel_size: Annotated[
        int,
        typer.Option(
            "--pipeline-parallel-size", "-pp", rich_help_panel=PLACEMENT, help="Stages that share out the layers."
        ),
    ] = 1,
    data_parallel_size: Annotated[
        int,
        typer.Option(
            "--data-parallel-size",
            "-dp",
            rich_help_panel=PLACEMENT,
            help="Attention groups of an expert-parallel replica; without --enable-expert-parallel, replicas.",
        ),
    ] = 1,
    enable_expert_parallel: Annotated[
        bool,
        typer.Option(
            "--enable-expert-parallel", rich_help_panel=PLACEMENT, help="Spread the experts over -dp x -tp ranks."
        ),
    ] = False,
    num_redundant_experts: Annotated[
        int, typer.Option(rich_help_panel=PLACEMENT, help="Copies of busy experts, per layer; needs --expert-load.")
    ] = 0,
    expert_load: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(rich_help_panel=PLACEMENT, help="A file of observed loads, by which experts are placed."),
    ] = None,
    record_expert_load: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(rich_help_panel=PLACEMENT, help="Add this service's loads to those of a file; new if not there."),
    ] = None,
    replicas: Annotated[int, typer.Option(rich_help_panel=PLACEMENT, help="Independent copies of the model.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PLACEMENT,
            help="Budget of a rank for weights and KV cache, e.g. 2GiB. Default: a share of the machine.",
        ),
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(rich_help_panel=PLACEMENT, help="KV blocks of an attention group, instead of --memory."),
    ] = None,
    gpus_per_rank: Annotated[float, typer.Option(rich_help_panel=PLACEMENT, help="Over 0, ranks run on CUDA.")] = 0.0,
    threads_per_rank: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PLACEMENT, help="CPU threads of a rank. Default: the cores (or --cpus) over the ranks."
        ),
    ] = None,
    cpus: Annotated[
        str | None,
        typer.Option(rich_help_panel=PLACEMENT, help="CPUs of its host that a rank may use, e.g. 0-3. Default: all."),
    ] = None,
    peak_flops_per_rank: Annotated[
        float | None,
        typer.Option(rich_help_panel=PLACEMENT, help="FLOP/s that a rank's device can do: exports FLOPs utilization."),
    ] = None,
    peak_bandwidth_per_rank: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PLACEMENT,
            help="Bytes/s of a rank's memory, e.g. 3.35TB: exports bandwidth utilization.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(rich_help_panel=ENGINE, help="auto, bfloat16, float16 or float32.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(rich_help_panel=ENGINE, help="Prompt + output tokens of a request.")
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=ENGINE,
            help="Sequences computed at once, per attention group. Default: 1024 on GPUs, 256 on CPUs.",
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=ENGINE,
            help="Tokens computed in one step, per attention group. Default: 8192 on GPUs, 2048 on CPUs.",
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(rich_help_panel=ENGINE, help="Tokens of a KV block.")] = 16,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            rich_help_panel=ENGINE,
            help="Reuse the KV of equal prefixes.",
        ),
    ] = True,
    admission: Annotated[
        str,
        typer.Option(
            rich_help_panel=ENGINE,
            help="predictive: requests begin when the predicted peak of KV use fits; prompt_only: when prompts fit.",
        ),
    ] = "predictive",
    workload: Annotated[
        str,
        typer.Option(
            rich_help_panel=PLACEMENT,
            help="What the placement is planned for, where no flag states it: chat, reasoning or long-prompt.",
        ),
    ] = "reasoning",
    hardware: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PLACEMENT,
            help="For that plan: 8xh200, or a file. Default: this machine, once `ridgewalk calibrate` has measured it.",
        ),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            rich_help_panel=ENGINE,
            help="kv_growth: by how long each replica and request delay each other; least_loaded; round_robin.",
        ),
    ] = "kv_growth",
    swap_space: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=ENGINE,
            help="Host memory of a rank, e.g. 4GiB: what preempted requests had is kept there instead of recomputed. "
            "Default on CPUs, with predictive admission: half of the KV cache, beside --memory; else none.",
        ),
    ] = None,
    slo_ttft_ms: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=ENGINE,
            help="Time to first token that routing tries to keep, for requests without the header x-llm-d-slo-ttft-ms.",
        ),
    ] = None,
    slo_tpot_ms: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=ENGINE,
            help="Mean time per further token that it tries to keep, for requests without x-llm-d-slo-tpot-ms.",
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(rich_help_panel=ENGINE, help="Waiting sequences per model; beyond it clients get 429.")
    ] = 2048,
    served_model_name: Annotated[str, typer.Option(rich_help_panel=ENGINE, help="What clients call the model.")] = "",
    host: Annotated[str, typer.Option(rich_help_panel=SERVICE)] = "0.0.0.0",
    port: Annotated[int, typer.Option(rich_help_panel=SERVICE)] = 8000,
    ingress_replicas: Annotated[int, typer.Option(rich_help_panel=SERVICE, help="Processes that speak HTTP.")] = 1,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RIDGEWALK_API_KEY", rich_help_panel=SERVICE, help="Key that clients must send; may be repeated."
        ),
    ] = None,
    api_key_file: Annotated[Optional[Path], typer.Option(rich_help_panel=SERVICE, help="Keys, one a line.")] = None,  # noqa: UP045
    app_name: Annotated[
        str, typer.Option(rich_help_panel=SERVICE, help="Of the Serve application, on a cluster that has others.")
    ] = "ridgewalk",
    with_prometheus: Annotated[
        bool,
        typer.Option("--with-prometheus", rich_help_panel=SERVICE, help="Run a Prometheus beside it, with our rules."),
    ] = False,
) -> None:
    """Serve MODEL (or a configuration file) with an OpenAI-compatible API until Ctrl-C."""
    from ridgewalk.launch.deployment import ServiceError

    try:
        service = _service_config(context)
        from ridgewalk.launch.service import run_service

        run_service(service, Console(soft_wrap=True), with_prometheus)
    except ConfigError as error:
        raise ConfigError(in_flags(str(error), _flags(context))) from None
    except ServiceError as error:
        _fail(error, 1)


@app.command("make-model")
def make_model(
    directory: Annotated[Path, typer.Argument(help="Where to write it.")],
    like: Annotated[str, typer.Option(help="q06b, q50m or moe: the shapes of the benchmark tables.")] = "q50m",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a random-weight checkpoint with a tokenizer, for benchmarks."""
    from ridgewalk.zoo.random_checkpoint import make_random_checkpoint

    try:
        make_random_checkpoint(like, directory, seed=seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    typer.echo(f"wrote {directory}; serve it with: ridgewalk serve {directory}")


def _service_config(context: typer.Context) -> ServeConfig:
    """The configuration that the flags of ``serve`` describe, or its file with the service's own flags before it."""
    values = dict(context.params)
    model, path = values.pop("model"), values.pop("config")
    values.pop("with_prometheus")  # of this command, not of the service
    if (model is None) == (path is None):
        raise ConfigError("name either a MODEL or a configuration file (-c FILE)")
    values["api_keys"] = values.pop("api_key") or []
    if not values["api_keys"] and _is_given(context, "api_key"):
        raise ConfigError("RIDGEWALK_API_KEY is blank; write a key into it, or unset it for a service open to all")
    if path is not None:
        return load_config(path, _overrides(context, values, path))
    name = values.pop("served_model_name")
    placement = {key: values.pop(key) for key in list(values) if key in PlacementConfig.model_fields}
    engine = {key: values.pop(key) for key in list(values) if key in ModelConfig.model_fields}
    described = {"model": model, "name": name, **engine}
    if any(_is_given(context, key) for key in placement):
        described["placements"] = [placement]
    return parse_config({"models": [described], **values}, "the command line")


def _overrides(context: typer.Context, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fields of the service that flags state beside the file.

    Raises:
        ConfigError: a flag that only a MODEL can have was given.
    """
    overrides = {}
    for parameter in context.command.params:
        field = "api_keys" if parameter.name == "api_key" else parameter.name
        if parameter.name in (None, "config", "with_prometheus") or not _is_given(context, parameter.name):
            continue
        if field not in ServeConfig.model_fields:
            raise ConfigError(f"{parameter.opts[0]} belongs to a model, and -c names a file: write it into {path}")
        overrides[field] = values[field]
    return overrides


def _flags(context: typer.Context) -> dict[str, str]:
    """The flag behind each field of the configuration: those given, if a file says the rest."""
    flags = {}
    for parameter in context.command.params:
        if parameter.name in (None, "config") or (
            context.params["config"] is not None and not _is_given(context, parameter.name)
        ):
            continue
        field = _FIELDS.get(parameter.name, parameter.name)
        flags[field] = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name.upper()
    return flags


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)  # of click's enum, or of the click within newer typers
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


@app.command()
def demo(
    questions: Annotated[int, typer.Option(help="Questions asked at once, shared by the models.")] = 200,
    num_blocks: Annotated[
        int, typer.Option(help="KV blocks of 16 tokens, of each group; fewer: the capacity cliff is nearer.")
    ] = 2048,
    svg: Annotated[Path | None, typer.Option(help="Also save what was printed as a picture.")] = None,
) -> None:
    """Serve the shipped models side by side, ask them, load them, and print what was measured."""
    from ridgewalk.launch.demo import run_demo
    from ridgewalk.launch.deployment import ServiceError

    console = Console(record=True, width=100) if svg is not None else Console(soft_wrap=True)
    try:
        succeeded = run_demo(questions, num_blocks, console)
    except ServiceError as error:
        _fail(error, 1)
    if svg is not None:
        console.save_svg(str(svg), title="make demo")
    raise typer.Exit(0 if succeeded else 1)


@app.command()
def watch(
    clients: Annotated[int, typer.Option(min=1, help="That ask each model, one question at a time.")] = 8,
    num_blocks: Annotated[
        int, typer.Option(min=1, help="KV blocks of 16 tokens, of each group; the default is scarce on purpose.")
    ] = 128,
) -> None:
    """Serve the shipped models under a small load, with a Prometheus to look at, until Ctrl-C."""
    from ridgewalk.launch.deployment import ServiceError
    from ridgewalk.launch.watch import run_watch

    try:
        run_watch(clients, num_blocks, Console(soft_wrap=True))
    except ServiceError as error:
        _fail(error, 1)
