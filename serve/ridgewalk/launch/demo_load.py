"""The demo's load: many questions at once, shared between the models, and what client and service saw meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
from rich.console import Console
from rich.progress import Progress

from ridgewalk.load.scrape import Scrape
from ridgewalk.load.streaming_client import Answer, RequestFailed, stream_completion
from ridgewalk.zoo.problems import Problem, is_right

SCRAPE_EVERY_S = 0.5


@dataclass
class ModelLoad:
    """One model's share."""

    num_questions: int = 0
    answers: list[Answer] = field(default_factory=list)
    num_right: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0  # from the first question to this model's last answer
    peak_kv_usage: float = 0.0
    fragmentation: list[float] = field(default_factory=list)


@dataclass
class DemoLoad:
    """All models, in the order they were named; ``window`` holds what the service's counters grew by."""

    models: dict[str, ModelLoad]
    window: Scrape = field(default_factory=lambda: Scrape({}))
    last: Scrape = field(default_factory=lambda: Scrape({}))  # at the end, for gauges


async def run_load(
    session: aiohttp.ClientSession, url: str, models: Sequence[str], problems: Sequence[Problem], console: Console
) -> DemoLoad:
    """Ask all problems at once, each model in turn, with a progress bar."""
    load = DemoLoad({model: ModelLoad() for model in models})
    console.print(f"\n{len(problems)} questions at once:")
    before = await _scrape(session, url)
    watcher = asyncio.create_task(_watch(session, url, load))
    started = time.perf_counter()
    with Progress(console=console) as progress:
        bar = progress.add_task("answered", total=len(problems))

        async def ask(model: str, problem: Problem) -> None:
            await _ask(session, url, model, problem, load.models[model])
            load.models[model].seconds = time.perf_counter() - started
            progress.advance(bar)

        await asyncio.gather(*(ask(models[i % len(models)], problem) for i, problem in enumerate(problems)))
    watcher.cancel()
    with suppress(asyncio.CancelledError):
        await watcher
    load.last = await _scrape(session, url)
    load.window = load.last.since(before)
    return load


async def _ask(session: aiohttp.ClientSession, url: str, model: str, problem: Problem, result: ModelLoad) -> None:
    result.num_questions += 1
    body = {"model": model, "messages": [{"role": "user", "content": problem.question}], "temperature": 0}
    try:
        answer = await stream_completion(session, f"{url}/v1/chat/completions", body)
    except (RequestFailed, aiohttp.ClientError, asyncio.TimeoutError) as error:
        result.failures.append(f"{problem.question} {error or type(error).__name__}")
    else:
        result.answers.append(answer)
        result.num_right += is_right(problem, answer.content)


async def _watch(session: aiohttp.ClientSession, url: str, load: DemoLoad) -> None:
    while True:
        scrape = await _scrape(session, url)
        for model, result in load.models.items():
            usage = scrape.total("ridgewalk_kv_cache_usage_ratio", model_name=model)
            result.peak_kv_usage = max(result.peak_kv_usage, usage)
            if scrape.total("ridgewalk_num_requests_running", model_name=model):
                result.fragmentation.append(scrape.total("ridgewalk_kv_internal_fragmentation_ratio", model_name=model))
        await asyncio.sleep(SCRAPE_EVERY_S)


async def _scrape(session: aiohttp.ClientSession, url: str) -> Scrape:
    async with session.get(f"{url}/metrics") as response:
        return Scrape.parse(await response.text())
