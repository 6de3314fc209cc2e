"""What a step of the whole engine takes beside products, attention and collectives: a small model really generates."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from ridgewalk.calibration.team import Team, Turns
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.placement.mesh import Mesh
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine

PROMPT, VOCABULARY, HIDDEN = 16, 16_000, 128
EXPERTS_PER_TOKEN = 4


@dataclass(frozen=True)
class StepsTask:
    """Engines that generate at the same time, with a small model."""

    num_layers: int
    replicas: int
    mesh: Mesh  # of each
    batches: tuple[int, ...]  # sequences of each attention group
    num_steps: int
    sparse: bool = False  # every layer routes tokens to experts

    @property
    def num_ranks(self) -> int:
        """On the machine."""
        return self.replicas * self.mesh.world_size

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.num_layers}{' sparse' * self.sparse} layers, {self.replicas} x {self.mesh.name}"


class StepPoint(msgspec.Struct, frozen=True):
    """Decode steps of a small model."""

    task: StepsTask
    num_sequences: int  # of each attention group
    context: float  # mean tokens of a sequence
    seconds: float  # of a step


def small_shape(task: StepsTask) -> dict[str, Any]:
    """Of a Qwen3 whose products take little; its vocabulary is that of a small model, for sampling."""
    shape = _dense_shape(task.num_layers, task.num_ranks)
    if not task.sparse:
        return shape
    return shape | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": max(16, 8 * task.mesh.world_size),
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _dense_shape(num_layers: int, num_ranks: int) -> dict[str, Any]:
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
        "head_dim": 64,
        "vocab_size": VOCABULARY,
    }


def write_small_model(task: StepsTask, folder: Path) -> Path:
    """A checkpoint of `small_shape` with random weights."""
    from ridgewalk.zoo.random_checkpoint import write_checkpoint

    return write_checkpoint(small_shape(task), folder, seed=0, dtype="bfloat16")


class EngineTeam(Team):
    """Engines that generate; schedulers and ranks run as they serve, in processes of their own.

    ``folder`` is free for checkpoints.
    """

    def __init__(self, task: StepsTask, folder: Path) -> None:
        model = write_small_model(task, folder / task.name)
        super().__init__(f"steps of {task.name}", _run_engine, [(task, str(model))] * task.replicas)
        self.num_processes = task.replicas + task.num_ranks

    def points(self) -> list[StepPoint]:
        """Time of a decode step of each batch: the mean over turns and replicas. When it has finished."""
        found = [msgspec.msgpack.decode(each, type=list[StepPoint]) for each in self.told]
        return [
            msgspec.structs.replace(same[0], seconds=fmean(point.seconds for point in same))
            for same in zip(*found, strict=True)
        ]


def _run_engine(turns: Turns, task: StepsTask, model: str) -> None:
    with OfflineEngine(_config(task, model), spawn=True) as engine:
        times = []
        for _ in turns:
            for batch in task.batches:
                turns.together()
                times.append((batch, _step_s(engine, batch * task.mesh.dp, task.num_steps)))
    points = [
        StepPoint(
            task,
            batch,
            PROMPT + task.num_steps / 2,
            fmean(seconds for measured, seconds in times if measured == batch),
        )
        for batch in task.batches
    ]
    turns.tell(msgspec.msgpack.encode(points))


def _config(task: StepsTask, model: str) -> EngineConfig:
    longest, mesh = PROMPT + task.num_steps + 8, task.mesh
    return EngineConfig(
        model_name="calibration",
        placement=mesh.name,
        model_path=model,
        dtype="bfloat16",
        tp=mesh.tp,
        dp=mesh.dp,
        expert_parallel=mesh.expert_parallel,
        max_model_len=longest,
        max_num_seqs=max(task.batches),
        max_num_batched_tokens=2048,
        block_size=16,
        max_waiting=max(task.batches) * mesh.dp,
        num_blocks=-(-longest // 16) * max(task.batches),
        swap_space=0,
        ranks_per_host=task.num_ranks,
    )


def _step_s(engine: OfflineEngine, batch: int, num_steps: int) -> float:
    """The mean of all steps after the first few: throughput is made of the slow ones too."""
    sampling = SamplingParams(max_tokens=num_steps, temperature=0.0)
    for number in range(batch):
        engine.core.add(str(number), 0, [(number * PROMPT + at) % VOCABULARY for at in range(PROMPT)], sampling)
    ends = []
    while engine.core.has_work:
        ends += [time.perf_counter()] * len(engine.core.pump())
        if engine.core.has_work:
            engine.executor.wait(1.0)
    gaps = [later - earlier for earlier, later in pairwise(ends)]
    return fmean(gaps[4:])
