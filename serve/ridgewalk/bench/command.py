"""`ridgewalk bench` on the command line."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape

from ridgewalk.config import ConfigError
from ridgewalk.placement.data_files import shipped_names

LOAD, SERVER, OUTPUT = "Load", "Server", "Report and tools"


def bench(
    context: typer.Context,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            "-p",
            rich_help_panel=LOAD,
            help=f"{', '.join(shipped_names('workloads'))}. Default: reasoning.",
        ),
    ] = None,
    trace: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(rich_help_panel=LOAD, help="JSON lines with input_length, output_length, timestamp (ms) or none."),
    ] = None,
    scale: Annotated[float, typer.Option(rich_help_panel=LOAD, help="Multiplies every length, e.g. 0.05.")] = 1.0,
    concurrency: Annotated[
        str | None, typer.Option(rich_help_panel=LOAD, help="Closed loop; several (4,16,64) make a sweep.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(rich_help_panel=LOAD, help="Open loop: requests per second, Poisson arrivals.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(rich_help_panel=LOAD, help="Requests at each load. Default: 100, or the whole trace.")
    ] = None,
    seed: Annotated[int, typer.Option(rich_help_panel=LOAD, help="The same seed asks the very same.")] = 0,
    force_lengths: Annotated[
        bool,
        typer.Option(
            "--force-lengths/--no-force-lengths",
            rich_help_panel=LOAD,
            help="Send ignore_eos, so that outputs are as long as asked; servers that refuse it need the other.",
        ),
    ] = True,
    slo_ttft: Annotated[
        str | None, typer.Option(rich_help_panel=LOAD, help="Time to first token of a good request, e.g. 500ms or 2s.")
    ] = None,
    slo_itl: Annotated[
        str | None, typer.Option(rich_help_panel=LOAD, help="Its mean inter-token latency, e.g. 50ms.")
    ] = None,
    slo_e2e: Annotated[str | None, typer.Option(rich_help_panel=LOAD, help="From end to end, e.g. 60s.")] = None,
    url: Annotated[
        str, typer.Option(rich_help_panel=SERVER, help="Any server with OpenAI's chat completions.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(rich_help_panel=SERVER, help="Default: the only one that the server has.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="RIDGEWALK_API_KEY", rich_help_panel=SERVER, help="For the server.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SERVER, help="Counts prompts: a folder, zoo name or hub id. Default: the model's name."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(rich_help_panel=OUTPUT, help="Folder of report.html and report.json.")] = Path(
        "bench-report"
    ),
    compare: Annotated[
        Optional[tuple[Path, Path]],  # noqa: UP045
        typer.Option(
            metavar="A.json B.json", rich_help_panel=OUTPUT, help="Draw two runs side by side; sends nothing."
        ),
    ] = None,
    aiperf: Annotated[
        str | None, typer.Option(rich_help_panel=OUTPUT, help="An aiperf that you have; else one is installed.")
    ] = None,
    aiperf_env: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(rich_help_panel=OUTPUT, help="Where it is installed. Default: a cache in your home folder."),
    ] = None,
) -> None:
    """Load-test an OpenAI endpoint, and join what clients saw with what the service measured."""
    console = Console(soft_wrap=True)
    _need_matplotlib()
    if compare is not None:
        _refuse_others(context, "compare", "out")
        _compare(*compare, out, console)
        return
    from ridgewalk.bench.aiperf import AiperfFailed
    from ridgewalk.bench.bench_run import run_bench
    from ridgewalk.bench.endpoint import find_endpoint
    from ridgewalk.bench.environment import SetupError, default_folder, ensure_aiperf, is_whole, named_aiperf
    from ridgewalk.bench.options import check_enough, choose_work, parse_loads, parse_slo
    from ridgewalk.bench.page import report_page
    from ridgewalk.bench.report import write_report
    from ridgewalk.bench.tokenizer_source import load_tokenizer
    from ridgewalk.bench.workload import check_context
    from ridgewalk.launch.stopping import Stopped, StopSignals

    slo = parse_slo(slo_ttft, slo_itl, slo_e2e)
    work = choose_work(profile, trace, requests, scale, seed, force_lengths)
    loads = parse_loads(concurrency, rate, has_times=work.requests[0].timestamp_ms is not None)
    check_enough(work, loads)
    program = named_aiperf(aiperf) if aiperf is not None else None
    page_file, data_file = _output_files(out, "report.html", "report.json")
    endpoint = find_endpoint(url, model, api_key)
    check_context(work.requests, endpoint.max_model_len, scale)
    prompts = load_tokenizer(tokenizer, endpoint.model)
    try:
        with StopSignals():
            if program is None:
                environment = aiperf_env or default_folder()
                if not is_whole(environment):
                    console.print(f"setting up aiperf in {escape(str(environment))}, once")
                with console.status("aiperf") as status:
                    program = ensure_aiperf(environment, lambda line: status.update(escape(line)))
            console.print(_about(endpoint.model, endpoint.url, endpoint.placement, work.name, len(work.requests)))
            run = run_bench(endpoint, prompts, work, loads, slo, program, console)
    except Stopped:
        console.print("stopped; nothing was written")
        raise typer.Exit(130) from None
    except (AiperfFailed, SetupError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None
    for sentence in run.report.findings:
        console.print(escape(sentence), highlight=False)
    try:
        write_report(run.report, data_file)
        page_file.write_text(report_page(run.report), encoding="utf-8")
    except OSError as error:
        raise _not_written(out, error) from None
    console.print(f"\n[bold]{escape(str(page_file))}[/]", highlight=False)
    if run.missing is not None:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(run.missing)}", highlight=False)
        raise typer.Exit(run.status)


def _compare(first: Path, second: Path, out: Path, console: Console) -> None:
    from ridgewalk.bench.page import compare_findings, compare_page
    from ridgewalk.bench.report import read_report

    reports = read_report(first), read_report(second)
    (path,) = _output_files(out, "compare.html")
    page = compare_page(*reports, (str(first), str(second)))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise _not_written(out, error) from None
    for sentence in compare_findings(*reports):
        console.print(escape(sentence), highlight=False)
    console.print(f"\n[bold]{escape(str(path))}[/]", highlight=False)


def _about(model: str, url: str, placement: str | None, work: str, count: int) -> str:
    where = f"{model} ({placement})" if placement else model
    return f"[bold]{escape(where)}[/] at {escape(url)}: {escape(work)}, {count} requests at each load"


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "bench draws with matplotlib, which is not installed: pip install 'ridgewalk[bench]'"
        ) from None


def _refuse_others(context: typer.Context, *allowed: str) -> None:
    """Raises ConfigError when the command line has other flags: they would be without effect."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name is not None
        and parameter.name not in allowed
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    ]
    if given:
        raise ConfigError(f"--compare: it draws two reports and sends nothing; leave out {', '.join(given)}")


def _output_files(out: Path, *names: str) -> list[Path]:
    """Where the output goes, tried out: a load may take hours, and must not be lost at its end.

    Raises:
        ConfigError: the folder or one of the files cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error.strerror}; name another folder") from None
    try:
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise _not_written(out, error) from None
    paths = [out / name for name in names]
    for path in paths:
        try:
            if path.exists():
                path.open("r+b").close()
        except OSError as error:
            raise _not_written(path, error) from None
    return paths


def _not_written(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--out: {path} cannot be written: {error.strerror}; name another folder")
