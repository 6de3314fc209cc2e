"""The whole service over HTTP, streaming. ``python -m tests.benchmarks.bench_http MODEL [-tp 2] [--url URL]``.

Starts `ridgewalk serve` itself unless a URL of a running OpenAI-compatible server is given (a peer's, say).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import aiohttp
import uvloop
from rich.console import Console

from ridgewalk.config import ServeConfig
from ridgewalk.launch.service import base_url, running_service
from ridgewalk.load.streaming_client import Answer, stream_completion
from ridgewalk.replica.host import free_port
from tests.benchmarks.workload import NEW_TOKENS, Rate, load_parser, prompts, rate, report


def main() -> None:
    """Measure and print."""
    parser = load_parser(__doc__)
    parser.add_argument("--url", help="of a server that runs already, without /v1")
    arguments = parser.parse_args()
    if arguments.url:
        uvloop.run(_run(arguments.url, arguments))
        return
    config = ServeConfig.model_validate(
        {
            "host": "127.0.0.1",
            "port": free_port("127.0.0.1"),
            "models": [
                {
                    "model": str(arguments.model),
                    "max_model_len": 1024,
                    "max_num_seqs": 64,
                    "enable_prefix_caching": False,
                    "placements": [{"tensor_parallel_size": arguments.tp, "num_blocks": 64 * 32}],
                }
            ],
        }
    )
    with running_service(config, Console()):
        uvloop.run(_run(base_url(config), arguments))


async def _run(url: str, arguments: argparse.Namespace) -> None:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await _round(session, url, arguments.model.name, 2, seed=1)  # connections, first requests
        rates = [
            await _measure(session, url, arguments.model.name, count, arguments.repeats)
            for count in arguments.concurrency
        ]
    report(f"{arguments.model.name} TP{arguments.tp}, over HTTP", rates, arguments.out)


async def _measure(session: aiohttp.ClientSession, url: str, model: str, concurrency: int, repeats: int) -> Rate:
    runs, first, gaps = [], [], []
    for repeat in range(repeats):
        started = time.perf_counter()
        answers = await _round(session, url, model, concurrency, seed=1000 * concurrency + repeat)
        runs.append(sum(answer.completion_tokens for answer in answers) / (time.perf_counter() - started))
        first += [answer.time_to_first_token for answer in answers]
        gaps += [gap for answer in answers for gap in answer.gaps]
    return rate(concurrency, runs, ttft_p50_s=statistics.median(first), itl_p50_s=statistics.median(gaps))


async def _round(session: aiohttp.ClientSession, url: str, model: str, concurrency: int, seed: int) -> list[Answer]:
    bodies = [
        {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        for prompt in prompts(concurrency, seed)
    ]
    return list(await asyncio.gather(*(stream_completion(session, f"{url}/v1/completions", body) for body in bodies)))


if __name__ == "__main__":
    main()
