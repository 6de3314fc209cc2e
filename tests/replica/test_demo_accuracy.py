"""The shipped model answers the same however many ranks share it."""

from __future__ import annotations

import pytest

from ridgewalk.api.served_model import load_served_model
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine
from ridgewalk.zoo import zoo_path
from ridgewalk.zoo.problems import is_right, sample_problems

PROBLEMS = 300
MODEL = "demo-dense"


def accuracy(tp: int) -> float:
    """Share of fresh problems answered exactly, greedy, BF16, through the whole engine."""
    model = load_served_model(MODEL, zoo_path(MODEL))
    assert model.chat_template is not None
    problems = sample_problems(PROBLEMS, seed=99)
    prompts = []
    for problem in problems:
        text = model.chat_template.render([{"role": "user", "content": problem.question}], add_generation_prompt=True)
        prompts.append(model.tokenizer.encode(text, add_special_tokens=False))
    sampling = [
        SamplingParams(
            max_tokens=model.max_model_len - len(prompt), temperature=0.0, stop_token_ids=tuple(model.eos_token_ids)
        )
        for prompt in prompts
    ]
    config = EngineConfig(
        model_name=MODEL,
        placement=f"TP{tp}",
        model_path=str(zoo_path(MODEL)),
        dtype="bfloat16",
        tp=tp,
        max_model_len=model.max_model_len,
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        block_size=16,
        max_waiting=1000,
        num_blocks=4096,
    )
    with OfflineEngine(config, spawn=True) as engine:
        requests = engine.generate(prompts, sampling)
    texts = [model.tokenizer.decode(request.output_token_ids, skip_special_tokens=True) for request in requests]
    return sum(is_right(problem, text) for problem, text in zip(problems, texts, strict=True)) / PROBLEMS


@pytest.mark.slow
def test_accuracy_is_the_same_at_tp_1_and_tp_2() -> None:
    one, two = accuracy(1), accuracy(2)
    assert one >= 0.95
    assert abs(one - two) <= 0.01
