"""Judges a zoo model on fresh problems, greedily, through Ridgewalk's own engine on one rank.

`python -m ridgewalk.zoo.evaluate DIR` evaluates a checkpoint folder; `train` calls the same functions.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine
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
    folder: Path,
    problems: Sequence[Problem],
    max_new_tokens: int = 1280,
    thinking: bool = True,
    mesh: Mesh = Mesh(),  # noqa: B008 (frozen)
) -> list[Judged]:
    """Greedy outputs for `problems`, in their order, in the dtype of the checkpoint in `folder`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [prompt_of(problem.question) + ("" if thinking else EMPTY_THINK) for problem in problems]
    token_ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(prompts, add_special_tokens=False)]
    end = tokenizer.token_to_id(TURN_END)
    sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0.0, stop_token_ids=(end,))
    with OfflineEngine(_engine_config(folder, mesh, max(map(len, token_ids)) + max_new_tokens), spawn=True) as engine:
        outputs = [request.output_token_ids for request in engine.generate(token_ids, sampling)]
    texts = tokenizer.decode_batch(outputs, skip_special_tokens=True)
    return [
        Judged(problem, text, len(output), is_right(problem, text))
        for problem, text, output in zip(problems, texts, outputs, strict=True)
    ]


def _engine_config(folder: Path, mesh: Mesh, max_model_len: int) -> EngineConfig:
    return EngineConfig(
        model_name=folder.name,
        placement=mesh.name,
        model_path=str(folder),
        dtype=ModelSpec.from_folder(folder).dtype,
        tp=mesh.tp,
        pp=mesh.pp,
        dp=mesh.dp,
        expert_parallel=mesh.expert_parallel,
        max_model_len=max_model_len,
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        block_size=16,
        max_waiting=1,  # for calls over the wire only
        num_blocks=4096,
    )


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


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """The report on `n` fresh problems, and on easy ones with thinking off, which do not count."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    judged = judge(folder, sample_problems(n, seed))
    wrong = [j for j in judged if not j.right]
    easy = judge(folder, easy_problems(min(n, 50), seed), thinking=False)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    load = expert_load(model, Tokenizer.from_file(str(folder / "tokenizer.json")), judged)
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
    args = parser.parse_args()
    print(json.dumps(evaluate(args.directory, args.n, args.seed), indent=2))


if __name__ == "__main__":
    main()
