"""`make watch`: the shipped models side by side, a small load that goes on, and a Prometheus that sees it."""

from __future__ import annotations

import asyncio
import random

import aiohttp
from rich.console import Console

from ridgewalk.launch.demo import PLACEMENTS, demo_config
from ridgewalk.launch.prometheus import find_prometheus, running_prometheus
from ridgewalk.launch.service import running_service
from ridgewalk.launch.stopping import Stopped
from ridgewalk.load.streaming_client import RequestFailed, stream_completion
from ridgewalk.zoo.problems import sample_problems

NUM_PROBLEMS = 500  # asked in turn, again and again
PAUSE_S = 2.0  # longest pause of a client between two questions
RETRY_S = 1.0
SEED = 7

QUERIES = (
    "sum by (model_name, placement) (rate(ridgewalk_generation_tokens_total[10s]))",
    "ridgewalk_kv_cache_usage_ratio",
    "sum by (model_name, op, phase) (rate(ridgewalk_collective_seconds_sum[10s]))",
    "ridgewalk_expert_load_imbalance",
)
"""To begin with."""


def run_watch(num_clients: int, num_blocks: int, console: Console) -> None:
    """Serve both models, ask them and keep a Prometheus until SIGINT or SIGTERM.

    Args:
        num_clients: of each model; each asks one question at a time and pauses a moment between two.
        num_blocks: KV blocks of each attention group.
        console: to print on.

    Raises:
        ConfigError: there is no Prometheus; nothing has started.
        ServiceError: the service failed to start.
    """
    program = find_prometheus()
    try:
        with (
            running_service(demo_config(num_blocks), console) as url,
            running_prometheus(program, url, console) as prometheus,
        ):
            console.print(f"\nserving at {url}/v1, metrics at {url}/metrics", highlight=False)
            if prometheus:
                console.print(f"[bold]Prometheus: {prometheus}[/]  (Graph; alerts: {prometheus}/alerts). Try:\n")
                for query in QUERIES:
                    console.print(f"  {query}", highlight=False, markup=False)
            console.print(
                f"\n{num_clients} clients ask each model. Dashboards: monitoring/README.md. Ctrl-C ends it.",
                highlight=False,
            )
            asyncio.run(_keep_asking(url, num_clients, console))
    except Stopped:
        console.print("stopped")


async def _keep_asking(url: str, num_clients: int, console: Console) -> None:
    questions = [problem.question for problem in sample_problems(NUM_PROBLEMS, seed=SEED)]
    reported: set[str] = set()  # an outage is one line, not one for every attempt

    async def client(session: aiohttp.ClientSession, model: str, number: int) -> None:
        rng = random.Random(f"{model} {number}")
        while True:
            body = {"model": model, "messages": [{"role": "user", "content": rng.choice(questions)}]}
            try:
                await stream_completion(session, f"{url}/v1/chat/completions", body)
            except (RequestFailed, aiohttp.ClientError, asyncio.TimeoutError) as error:
                problem = f"{model}: {error or type(error).__name__}"
                if problem not in reported:
                    reported.add(problem)
                    console.print(f"[yellow]warning:[/] {problem}", highlight=False)
                await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(rng.uniform(0, PAUSE_S))

    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session, model, number) for model in PLACEMENTS for number in range(num_clients)))
