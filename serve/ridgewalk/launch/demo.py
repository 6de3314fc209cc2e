"""`make demo`: the shipped models side by side, asked three questions aloud and then two hundred at once."""

from __future__ import annotations

import asyncio
from itertools import cycle

import aiohttp
from rich.console import Console

from ridgewalk.config import ServeConfig
from ridgewalk.launch.demo_load import DemoLoad, run_load
from ridgewalk.launch.demo_table import load_table
from ridgewalk.launch.service import running_service
from ridgewalk.launch.stopping import Stopped
from ridgewalk.load.streaming_client import stream_completion
from ridgewalk.replica.host import free_port
from ridgewalk.zoo.problems import Problem, sample_problems

PLACEMENTS = {
    "demo-dense": {"tensor_parallel_size": 2},
    "demo-moe": {"data_parallel_size": 2, "enable_expert_parallel": True},
}
"""The dense model shares its layers between two ranks; the sparse one its experts, each rank attending for itself."""

ALOUD = ("sub", "mul", "story")  # kinds of problems asked first, one by one
SEED = 2026
NEEDED_SHARE = 0.9


def run_demo(num_questions: int, num_blocks: int, console: Console) -> bool:
    """Serve, ask, load, report. True when everything was answered and enough of it right by each model.

    Args:
        num_questions: asked at once, of all models together.
        num_blocks: KV blocks of each attention group.
        console: to print on.
    """
    config = demo_config(num_blocks)
    try:
        with running_service(config, console) as url:
            load = asyncio.run(_ask(url, num_questions, console))
    except Stopped:
        console.print("the demo was interrupted")
        return False
    names = {model.served_name: model.placements[0].name for model in config.models}
    console.print(load_table(load, names))
    failures = [failure for result in load.models.values() for failure in result.failures]
    for failure in failures[:3]:
        console.print(f"[red]failed:[/] {failure}", highlight=False)
    return not failures and all(
        result.num_right >= NEEDED_SHARE * result.num_questions for result in load.models.values()
    )


def demo_config(num_blocks: int) -> ServeConfig:
    """Both models on a free port, with so many KV blocks in each attention group."""
    return ServeConfig.model_validate(
        {
            "host": "127.0.0.1",
            "port": free_port("127.0.0.1"),
            "models": [
                {"model": model, "placements": [{**placement, "num_blocks": num_blocks}]}
                for model, placement in PLACEMENTS.items()
            ],
        }
    )


async def _ask(url: str, num_questions: int, console: Console) -> DemoLoad:
    problems = sample_problems(num_questions, seed=SEED)
    aloud = [next(problem for problem in problems if problem.kind == kind) for kind in ALOUD]
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        for problem, model in zip(aloud, cycle(PLACEMENTS), strict=False):
            await _ask_aloud(session, url, model, problem, console)
        return await run_load(session, url, tuple(PLACEMENTS), problems, console)


async def _ask_aloud(session: aiohttp.ClientSession, url: str, model: str, problem: Problem, console: Console) -> None:
    console.print(f"\n[cyan]{model}[/] [bold]{problem.question}[/]", highlight=False)
    answering = False

    def show(text: str, is_reasoning: bool) -> None:
        nonlocal answering
        if not is_reasoning and not answering:
            answering = True
            console.print("\nanswer: ", end="", style="green")
        console.print(text, end="", style="dim" if is_reasoning else "green bold", highlight=False, markup=False)

    body = {"model": model, "messages": [{"role": "user", "content": problem.question}], "temperature": 0}
    answer = await stream_completion(session, f"{url}/v1/chat/completions", body, show)
    console.print(
        f"\n[dim]({answer.completion_tokens} tokens, first after {answer.time_to_first_token * 1e3:.0f} ms)[/]",
        highlight=False,
    )
