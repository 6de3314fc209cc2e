"""Judges a zoo model on fresh problems, greedily, with transformers.

`python -m ridgewalk.zoo.evaluate DIR` evaluates a checkpoint folder; `train` calls the same functions.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgewalk.zoo.data import EMPTY_THINK, prompt_of
from ridgewalk.zoo.experts import LoadMeter, worst_over_mean
from ridgewalk.zoo.problems import Problem, easy_problems, is_right, sample_problems
from ridgewalk.zoo.tokenizer import END_OF_TEXT, TURN_END

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Judged:
    """One problem with what the model wrote, and how many tokens that took (the end of the turn included)."""

    problem: Problem
    text: str
    num_tokens: int
    right: bool


def judge(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    problems: list[Problem],
    max_new_tokens: int = 1280,
    batch_size: int = 64,
    thinking: bool = True,
) -> list[Judged]:
    """Greedy outputs for `problems`, in their order; batches hold questions whose worked outputs have like lengths."""
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].output))
    judged: dict[int, Judged] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        prompts = [prompt_of(problems[i].question) + ("" if thinking else EMPTY_THINK) for i in indices]
        for i, ids in zip(indices, _generate(model, tokenizer, prompts, max_new_tokens), strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            judged[i] = Judged(problems[i], text, len(ids), is_right(problems[i], text))
    return [judged[i] for i in range(len(problems))]


def _generate(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    """Output ids of each prompt, up to and including the end of the turn."""
    import torch

    pad, end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    encoded = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[pad] * (width - len(e)) + e for e in encoded])
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
            use_cache=True,
        )
    rows = [row[width:].tolist() for row in out]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def accuracy_by_kind(judged: list[Judged]) -> dict[str, dict[str, float]]:
    """Number of problems and share of exact answers for each kind."""
    kinds = sorted({j.problem.kind for j in judged})
    groups = {k: [j.right for j in judged if j.problem.kind == k] for k in kinds}
    return {k: {"n": len(g), "accuracy": round(sum(g) / len(g), 4)} for k, g in groups.items()}


def length_statistics(judged: list[Judged]) -> dict[str, float]:
    """Mean, median, 99th percentile and maximum of the number of output tokens."""
    lengths = sorted(j.num_tokens for j in judged)
    p99 = lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]
    return {
        "mean": round(statistics.mean(lengths), 1),
        "median": statistics.median(lengths),
        "p99": p99,
        "max": lengths[-1],
    }


def expert_load(
    model: PreTrainedModel, tokenizer: Tokenizer, judged: list[Judged], batch_size: int = 64
) -> list[float]:
    """The busiest expert's load over the mean in each sparse layer, over all tokens of the questions and outputs.

    Empty for a dense model. Loads over 1 cost a serving system: the experts of a layer wait for the busiest.
    """
    import torch

    meter = LoadMeter(model)
    pad = tokenizer.token_to_id(END_OF_TEXT)
    texts = [prompt_of(j.problem.question) + j.text + TURN_END for j in judged]
    rows = sorted((e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)), key=len)
    loads = torch.zeros(0, 0)
    for start in range(0, len(rows) if meter.routers else 0, batch_size):
        batch = rows[start : start + batch_size]
        ids = torch.tensor([row + [pad] * (len(batch[-1]) - len(row)) for row in batch])
        with torch.inference_mode():
            model.model(input_ids=ids, use_cache=False)  # padded on the right: causal attention needs no mask
        counts = meter.loads(ids != pad)
        loads = counts if start == 0 else loads + counts
    meter.close()
    return worst_over_mean(loads)


def evaluate(model: PreTrainedModel, tokenizer: Tokenizer, n: int, seed: int) -> dict[str, Any]:
    """The report on `n` fresh problems, and on easy ones with thinking off, which do not count."""
    judged = judge(model, tokenizer, sample_problems(n, seed))
    wrong = [j for j in judged if not j.right]
    easy = judge(model, tokenizer, easy_problems(min(n, 50), seed), thinking=False)
    load = expert_load(model, tokenizer, judged)
    return {
        "seed": seed,
        "n": n,
        "accuracy": round(1 - len(wrong) / n, 4),
        "by_kind": accuracy_by_kind(judged),
        "output_tokens": length_statistics(judged),
        "thinking_off_easy_accuracy": round(sum(j.right for j in easy) / len(easy), 4),
        **({"expert_load": load} if load else {}),
        "wrong": [{"question": j.problem.question, "answer": j.problem.answer, "output": j.text} for j in wrong[:20]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()

    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.directory, dtype=getattr(torch, args.dtype))
    tokenizer = Tokenizer.from_file(str(args.directory / "tokenizer.json"))
    print(json.dumps(evaluate(model.eval(), tokenizer, args.n, args.seed), indent=2))


if __name__ == "__main__":
    main()
