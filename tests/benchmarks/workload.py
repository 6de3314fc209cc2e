"""The load of the peers' table: 64-token prompts, 256 new tokens, greedy, end of sequence ignored."""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

PROMPT_TOKENS = 64
NEW_TOKENS = 256
CONCURRENCY = (1, 8, 32, 64)
VOCABULARY = 16_000  # ids below it exist in every benchmark checkpoint


@dataclass(frozen=True)
class Rate:
    """One cell of a table: the median of several runs, with all of them."""

    concurrency: int
    tokens_per_s: float
    runs: list[float]
    ttft_p50_s: float | None = None
    itl_p50_s: float | None = None


def load_parser(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of this load is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("-tp", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(CONCURRENCY))
    parser.add_argument("--out", type=Path)
    return parser


def prompts(count: int, seed: int) -> list[list[int]]:
    """Random prompts that share no prefix."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def rate(concurrency: int, runs: list[float], **medians: float) -> Rate:
    """The median of tokens/s over runs."""
    return Rate(concurrency, statistics.median(runs), [round(run, 1) for run in runs], **medians)


def report(title: str, rates: list[Rate], out: Path | None) -> None:
    """Print a Markdown row per concurrency, and write JSON when asked."""
    print(f"\n{title}\n\n| concurrency | tokens/s (median) | runs | TTFT p50 | ITL p50 |\n|---|---|---|---|---|")
    for item in rates:
        first = "" if item.ttft_p50_s is None else f"{item.ttft_p50_s * 1e3:.0f} ms"
        gap = "" if item.itl_p50_s is None else f"{item.itl_p50_s * 1e3:.1f} ms"
        print(f"| {item.concurrency} | {item.tokens_per_s:.0f} | {item.runs} | {first} | {gap} |")
    if out is not None:
        out.write_text(json.dumps({"title": title, "rates": [asdict(item) for item in rates]}, indent=2) + "\n")
