"""Steps on one GPU, measured and predicted, and the engine alone: shapes that `plan` ships, with random weights.

``python -m tests.benchmarks.bench_gpu r1-distill-qwen-14b [--hardware 1xh200] [--engine]``. A step decodes one token
for each sequence at a context; its time is from event to event on the device, the median of ten.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.kernels.block_scales import Weight
from ridgewalk.model import runner as runner_module
from ridgewalk.model.batch import StepTensors
from ridgewalk.model.runner import ModelRunner, create_runner
from ridgewalk.model.runner_config import RunnerConfig
from ridgewalk.model.sharding import Parameter
from ridgewalk.placement.cost_model import CostModel, GroupLoad
from ridgewalk.placement.data_files import shipped_names, shipped_path
from ridgewalk.placement.hardware import find_hardware
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine

BLOCK_SIZE = 16
NUM_BLOCKS = 8192
"""KV for 131,072 tokens. A load of more reads blocks twice, far apart; the L2 cache holds less than one layer's."""

BATCHES = (1, 8, 64, 256)
CONTEXTS = (512, 4096)
PREFILLS = ((2048, 0), (8192, 0), (2048, 8192))  # tokens, and tokens before them
PROMPT, NEW_TOKENS = 256, 128
DEVICE = torch.device("cuda")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a shape that `ridgewalk plan` ships")
    parser.add_argument("--hardware", default="1xh200", help="that predictions are for")
    parser.add_argument("--engine", action="store_true", help="the engine instead, greedy and with top-p")
    arguments = parser.parse_args()
    runner_module.load_parameters = _random_parameters
    with tempfile.TemporaryDirectory() as folder:
        shape = shipped_path("models", arguments.model)
        if shape is None:
            parser.error(f"{arguments.model} is not among {', '.join(shipped_names('models'))}")
        shutil.copy(shape, Path(folder) / "config.json")
        print(f"{arguments.model} on {torch.cuda.get_device_name()}, torch {torch.__version__}")
        if arguments.engine:
            _measure_engine(folder)
        else:
            _compare_steps(folder, arguments.hardware)


def _random_parameters(
    folder: object, spec: ModelSpec, plan: dict[str, Parameter], dtype: torch.dtype, device: torch.device, *_: object
) -> dict[str, Weight]:
    def parameter(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        return made.fill_(1) if "norm" in name else made.normal_(0, 0.02)

    return {name: parameter(name, each.shape) for name, each in plan.items()}


@torch.inference_mode()
def _compare_steps(folder: str, hardware: str) -> None:
    config = RunnerConfig(folder, "bfloat16", "cuda", 0, max_num_seqs=512, max_model_len=16384)
    runner = create_runner(config)
    runner.load()
    runner.allocate(NUM_BLOCKS)
    runner.warm_up()
    cost = CostModel(ModelSpec.from_folder(folder), Mesh(), find_hardware(hardware))
    errors = []
    print(f"kernels: {runner.kernels_name}; {runner.num_captured} sizes of steps captured")
    print("| sequences | context | launched one by one, ms | captured, ms | predicted, ms | |")
    for batch in BATCHES:
        for context in CONTEXTS:
            step = _decode_step(batch, context)
            eager = _milliseconds(lambda step=step: runner._decoder.forward(step, runner._caches))
            captured = _milliseconds(lambda step=step: _run_captured(runner, step))
            load = GroupLoad(batch, batch, batch * context, batch * context)
            predicted = cost.stage_times([load])[0].total * 1000
            error = predicted / captured - 1
            errors.append(abs(error))
            print(f"| {batch} | {context} | {eager:.1f} | {captured:.1f} | {predicted:.1f} | {error:+.0%} |")
    print(f"decode steps: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    for tokens, before in PREFILLS:
        step = _prefill_step(tokens, before)
        took = _milliseconds(lambda step=step: runner._decoder.forward(step, runner._caches), 3)
        pairs = tokens * before + tokens * tokens / 2
        predicted = cost.stage_times([GroupLoad(tokens, 1, tokens + before, pairs)])[0].total * 1000
        error = predicted / took - 1
        print(f"prefill of {tokens} after {before}: {took:.0f} ms, predicted {predicted:.0f} ({error:+.0%})")
    runner.close()


def _run_captured(runner: ModelRunner, step: StepTensors) -> None:
    if runner.num_captured:
        assert runner._graphs is not None
        assert runner._graphs.takes(step)
        runner._graphs.run(step)
    else:
        runner._decoder.forward(step, runner._caches)


def _decode_step(batch: int, context: int) -> StepTensors:
    table = torch.randint(0, NUM_BLOCKS, (batch, context // BLOCK_SIZE), dtype=torch.int32, device=DEVICE)
    return StepTensors(
        token_ids=torch.randint(0, 1000, (batch,), device=DEVICE),
        positions=torch.full((batch,), context - 1, device=DEVICE),
        slot_mapping=table[:, -1].long() * BLOCK_SIZE + BLOCK_SIZE - 1,
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=DEVICE),
        seqused_k=torch.full((batch,), context, dtype=torch.int32, device=DEVICE),
        block_table=table,
        max_seqlen_q=1,
        max_seqlen_k=context,
        sampled_tokens=None,
        num_sampled=batch,
    )


def _prefill_step(tokens: int, before: int) -> StepTensors:
    context = tokens + before
    table = torch.randperm(NUM_BLOCKS, device=DEVICE)[None, : context // BLOCK_SIZE].int()
    positions = torch.arange(before, context, device=DEVICE)
    return StepTensors(
        token_ids=torch.randint(0, 1000, (tokens,), device=DEVICE),
        positions=positions,
        slot_mapping=table[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE),
        seqused_k=torch.tensor([context], dtype=torch.int32, device=DEVICE),
        block_table=table,
        max_seqlen_q=tokens,
        max_seqlen_k=context,
        sampled_tokens=torch.tensor([tokens - 1], device=DEVICE),
        num_sampled=1,
    )


def _milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended))
    return statistics.median(times)


def _measure_engine(folder: str) -> None:
    config = EngineConfig(
        model_name="random",
        placement="TP1",
        model_path=folder,
        dtype="bfloat16",
        device="cuda",
        max_model_len=2048,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        max_waiting=10_000,
        num_blocks=NUM_BLOCKS,
    )
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    drawn = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.6, top_p=0.95, seed=1)
    generator = torch.Generator().manual_seed(0)
    with OfflineEngine(config) as engine:
        for name, sampling in (("greedy", greedy), ("temperature 0.6, top-p 0.95", drawn)):
            for concurrency in (1, 64, 256):
                rates = []
                for _ in range(3):
                    load = torch.randint(0, 1000, (concurrency, PROMPT), generator=generator).tolist()
                    started = time.perf_counter()
                    engine.generate(load, sampling)
                    rates.append(concurrency * NEW_TOKENS / (time.perf_counter() - started))
                print(f"{name}, {concurrency} at once: {statistics.median(rates):.0f} tokens/s, prompts included")


if __name__ == "__main__":
    main()
