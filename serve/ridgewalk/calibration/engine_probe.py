"""What a step of the whole engine takes beside products, attention and collectives: a small model really generates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ridgewalk.calibration.stopwatch import lower_quartile
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.placement.mesh import Mesh
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine

PROMPT, VOCABULARY, HIDDEN = 16, 16_000, 64


@dataclass(frozen=True)
class StepPoint:
    """Decode steps of so many sequences, on a model of so many layers."""

    num_layers: int
    num_sequences: int
    context: float  # mean tokens of a sequence
    seconds: float  # of a step


def small_shape(num_layers: int, num_ranks: int) -> dict[str, Any]:
    """Of a Qwen3 whose products take little; its vocabulary is that of a small model, for sampling."""
    kv_heads = num_ranks * -(-4 // num_ranks)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "hidden_size": HIDDEN,
        "intermediate_size": 64 * num_ranks,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
    }


def write_small_model(folder: Path, num_layers: int, num_ranks: int) -> Path:
    """A checkpoint of `small_shape` with random weights."""
    from ridgewalk.zoo.random_checkpoint import write_checkpoint

    return write_checkpoint(small_shape(num_layers, num_ranks), folder, seed=0, dtype="bfloat16")


def measure_steps(
    folder: Path, num_layers: int, num_ranks: int, batches: Sequence[int], num_steps: int, passes: int
) -> list[StepPoint]:
    """Time of a decode step of each batch, the median over passes, with ranks in processes of their own.

    Raises:
        ExecutorError: a rank failed.
    """
    longest = PROMPT + num_steps + 8
    mesh = Mesh(tp=num_ranks)
    config = EngineConfig(
        model_name="calibration",
        placement=mesh.name,
        model_path=str(folder),
        dtype="bfloat16",
        tp=num_ranks,
        max_model_len=longest,
        max_num_seqs=max(batches),
        max_num_batched_tokens=2048,
        block_size=16,
        max_waiting=max(batches),
        num_blocks=-(-longest // 16) * max(batches),
    )
    with OfflineEngine(config, spawn=True) as engine:
        times = [[_step_s(engine, batch, num_steps) for batch in batches] for _ in range(passes)]
    return [
        StepPoint(num_layers, batch, PROMPT + num_steps / 2, median(seconds))
        for batch, seconds in zip(batches, zip(*times, strict=True), strict=True)
    ]


def _step_s(engine: OfflineEngine, batch: int, num_steps: int) -> float:
    """Lower quartile of all steps after the first few."""
    sampling = SamplingParams(max_tokens=num_steps, temperature=0.0)
    for number in range(batch):
        engine.core.add(str(number), 0, [(number * PROMPT + at) % VOCABULARY for at in range(PROMPT)], sampling)
    ends = []
    while engine.core.has_work:
        ends += [time.perf_counter()] * len(engine.core.pump())
        if engine.core.has_work:
            engine.executor.wait(1.0)
    gaps = [later - earlier for earlier, later in pairwise(ends)]
    return lower_quartile(gaps[4:])
