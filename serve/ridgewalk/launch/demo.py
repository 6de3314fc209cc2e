"""`make demo`: the shipped model on tensor-parallel ranks, asked three questions aloud and then two hundred at once."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ridgewalk.config import ServeConfig
from ridgewalk.launch.service import running_service
from ridgewalk.launch.stopping import Stopped
from ridgewalk.load.percentile import percentile
from ridgewalk.load.scrape import Scrape
from ridgewalk.load.streaming_client import Answer, RequestFailed, stream_completion
from ridgewalk.replica.host import free_port
from ridgewalk.zoo.problems import Problem, is_right, sample_problems

MODEL = "demo-dense"
ALOUD = ("sub", "mul", "story")  # kinds of problems asked first, one by one
SEED = 2026
SCRAPE_EVERY_S = 0.5
NEEDED_SHARE = 0.9


@dataclass
class LoadResult:
    """What two hundred clients saw, and what the service measured meanwhile."""

    answers: list[Answer] = field(default_factory=list)
    num_right: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_kv_usage: float = 0.0
    fragmentation: list[float] = field(default_factory=list)
    window: Scrape = field(default_factory=lambda: Scrape({}))


def run_demo(num_questions: int, num_blocks: int, console: Console) -> bool:
    """Serve, ask, load, report. True when everything was answered and enough of it right."""
    config = ServeConfig.model_validate(
        {
            "host": "127.0.0.1",
            "port": free_port("127.0.0.1"),
            "models": [{"model": MODEL, "placements": [{"tensor_parallel_size": 2, "num_blocks": num_blocks}]}],
        }
    )
    result = LoadResult()
    try:
        with running_service(config, console) as url:
            asyncio.run(_ask(url, num_questions, result, console))
    except Stopped:
        console.print("the demo was interrupted")
        return False
    console.print(_table(result, num_questions))
    for failure in result.failures[:3]:
        console.print(f"[red]failed:[/] {failure}", highlight=False)
    return not result.failures and result.num_right >= NEEDED_SHARE * num_questions


async def _ask(url: str, num_questions: int, result: LoadResult, console: Console) -> None:
    problems = sample_problems(num_questions, seed=SEED)
    aloud = [next(problem for problem in problems if problem.kind == kind) for kind in ALOUD]
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        for problem in aloud:
            await _ask_aloud(session, url, problem, console)
        await _load(session, url, problems, result, console)


async def _ask_aloud(session: aiohttp.ClientSession, url: str, problem: Problem, console: Console) -> None:
    console.print(f"\n[bold]{problem.question}[/]", highlight=False)

    answering = False

    def show(text: str, is_reasoning: bool) -> None:
        nonlocal answering
        if not is_reasoning and not answering:
            answering = True
            console.print("\nanswer: ", end="", style="green")
        console.print(text, end="", style="dim" if is_reasoning else "green bold", highlight=False, markup=False)

    answer = await stream_completion(session, f"{url}/v1/chat/completions", _body(problem), show)
    console.print(
        f"\n[dim]({answer.completion_tokens} tokens, first after {answer.time_to_first_token * 1e3:.0f} ms)[/]",
        highlight=False,
    )


async def _load(
    session: aiohttp.ClientSession, url: str, problems: list[Problem], result: LoadResult, console: Console
) -> None:
    console.print(f"\n{len(problems)} questions at once:")
    before = await _scrape(session, url)
    watcher = asyncio.create_task(_watch(session, url, result))
    started = time.perf_counter()
    with Progress(console=console) as progress:
        bar = progress.add_task("answered", total=len(problems))

        async def ask(problem: Problem) -> None:
            try:
                answer = await stream_completion(session, f"{url}/v1/chat/completions", _body(problem))
            except (RequestFailed, aiohttp.ClientError, asyncio.TimeoutError) as error:
                result.failures.append(f"{problem.question} {error or type(error).__name__}")
            else:
                result.answers.append(answer)
                result.num_right += is_right(problem, answer.content)
            progress.advance(bar)

        await asyncio.gather(*(ask(problem) for problem in problems))
    result.seconds = time.perf_counter() - started
    watcher.cancel()
    with suppress(asyncio.CancelledError):
        await watcher
    result.window = (await _scrape(session, url)).since(before)


async def _watch(session: aiohttp.ClientSession, url: str, result: LoadResult) -> None:
    while True:
        scrape = await _scrape(session, url)
        result.peak_kv_usage = max(result.peak_kv_usage, scrape.total("ridgewalk_kv_cache_usage_ratio"))
        if scrape.total("ridgewalk_num_requests_running"):
            result.fragmentation.append(scrape.total("ridgewalk_kv_internal_fragmentation_ratio"))
        await asyncio.sleep(SCRAPE_EVERY_S)


async def _scrape(session: aiohttp.ClientSession, url: str) -> Scrape:
    async with session.get(f"{url}/metrics") as response:
        return Scrape.parse(await response.text())


def _body(problem: Problem) -> dict[str, object]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": problem.question}],
        "temperature": 0,
    }


def _table(result: LoadResult, num_questions: int) -> Table:
    answers, window = result.answers, result.window
    tokens = sum(answer.completion_tokens for answer in answers)
    first = [answer.time_to_first_token for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    table = Table(title=f"{MODEL} on two tensor-parallel ranks", show_header=False)
    table.add_row("right answers", f"{result.num_right} of {num_questions}")
    table.add_row("tokens/s", f"{tokens / result.seconds:,.0f}  ({tokens:,} tokens in {result.seconds:.1f} s)")
    if gaps:
        table.add_row("time to first token", f"p50 {_ms(percentile(first, 0.5))}, p99 {_ms(percentile(first, 0.99))}")
        table.add_row("inter-token latency", f"p50 {_ms(percentile(gaps, 0.5))}, p99 {_ms(percentile(gaps, 0.99))}")
    table.add_row("KV cache used, at most", f"{result.peak_kv_usage:.0%}")
    if result.fragmentation:
        mean = sum(result.fragmentation) / len(result.fragmentation)
        table.add_row("KV internal fragmentation", f"{mean:.1%} of the slots of used blocks, on average")
    table.add_row("preemptions", f"{window.total('ridgewalk_num_preemptions_total'):.0f}")
    table.add_row("tokens recomputed", f"{window.total('ridgewalk_recomputed_tokens_total'):.0f}")
    table.add_row("throttled for want of KV", f"{window.total('ridgewalk_kv_throttled_seconds_total'):.1f} s")
    for phase in ("wait", "transfer"):
        mean_s = window.mean("ridgewalk_collective_seconds", op="all_reduce", phase=phase)
        if mean_s is not None:
            table.add_row(f"all-reduce {phase}", f"{mean_s * 1e6:.0f} us on average")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"
