"""How near the planner comes to the figures of arXiv 2605.19775 (8 x H200, vLLM v1, closed batches of 2,000).

    python -m tests.benchmarks.fidelity [table|order|steps|sensitivity]

Fitted, all of them global: the cut of the reasoning workload's outputs, and the hardware's `ranks_overhead_s` and
`stage_overhead_s`; to the rows marked so. Everything else is as the data files say.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import msgspec

from ridgewalk.bench.lengths import lognormal_with_share_above
from ridgewalk.bench.profiles import PROFILES
from ridgewalk.bench.workload import sample_requests
from ridgewalk.placement.cost_model import CostModel, GroupLoad
from ridgewalk.placement.data_files import shipped_path
from ridgewalk.placement.hardware import find_hardware
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.planning.planner import evaluate
from ridgewalk.planning.policy import POLICIES
from ridgewalk.planning.shape import parse_placement
from ridgewalk.planning.simulator import Arrival, Scene

REQUESTS = 2_000
PUBLISHED = [  # model, hardware, placement, seconds, fitted to
    ("qwen2.5-14b", "8xh200", "DP8", 332, True),
    ("qwen2.5-14b", "8xh200", "PP2xTP4", 1172, True),
    ("qwen2.5-32b", "h200", "TP1", 4219, True),
    ("qwen2.5-32b", "8xh200", "DP8", 857, False),
    ("qwen2.5-32b", "8xh200", "TP8", 686, False),
    ("qwen2.5-32b", "8xh200", "DP4xTP2", 484, False),
]
MEASURED_STEPS = [  # who, sequences, context, whether the host waits, median milliseconds from token to token
    ("TensorRT-LLM issue 5929", 1, 1_900, False, 13.8),
    ("vLLM 0.11, docs.gpustack.ai, ShareGPT at 7,451 tokens/s", 490, 320, True, 66.1),
]
ORDERS = [  # model, placements; the paper has the first ahead, or in this order
    ("qwen2.5-14b", ("DP8", "DP4xTP2", "DP2xTP4", "TP8", "PP2xTP4")),
    ("qwen2.5-32b", ("DP4xTP2", "TP8", "DP8")),
    ("llama-3.1-405b", ("TP8", "PP8")),
    ("deepseek-r1", ("PP2xTP4", "PP4xTP2", "TP8")),
]


def scene(model: str, hardware: str, cut: float = 1.0, sequences: float = 1.0, **constants: float) -> Scene:
    """The paper's load. Factors on the fitted constants, and on others of the hardware by name."""
    path = shipped_path("models", model)
    assert path is not None
    profile = PROFILES["reasoning"]
    longest = round(profile.outputs.longest * cut)
    profile = replace(profile, outputs=lognormal_with_share_above(5_000, 0.45, sigma=0.9, longest=longest))
    devices = find_hardware(hardware)
    scaled = {name: getattr(devices, name) * factor for name, factor in constants.items()}
    policy = replace(POLICIES["vllm"], max_num_seqs=round(POLICIES["vllm"].max_num_seqs * sequences))
    arrivals = tuple(
        Arrival(0.0, request.input_length, request.output_length)
        for request in sample_requests(profile, REQUESTS, seed=0)
    )
    spec = ModelSpec.from_config(json.loads(path.read_text()))
    return Scene(spec, msgspec.structs.replace(devices, **scaled), policy, arrivals)


def seconds(model: str, hardware: str, placements: tuple[str, ...], **factors: float) -> dict[str, float]:
    """Makespans by placement."""
    found = evaluate(scene(model, hardware, **factors), [parse_placement(name) for name in placements])
    for candidate in found:
        if candidate.outcome is None:
            raise SystemExit(f"{model} {candidate.placement.name}: {candidate.problem}")
    return {each.placement.name: each.outcome.makespan_s for each in found if each.outcome is not None}


def table() -> None:
    print("| model | placement | paper | simulated | ratio | |\n|---|---|---|---|---|---|")
    for model, hardware, placement, published, fitted in PUBLISHED:
        simulated = seconds(model, hardware, (placement,))[placement]
        where = "one GPU" if hardware == "h200" else placement
        ratio, note = simulated / published, "fitted" if fitted else "unseen"
        print(f"| {model} | {where} | {published} | {simulated:.0f} | {ratio:.2f} | {note} |", flush=True)


def steps() -> None:
    """Steps of DeepSeek-R1 with TP8 on 8 H200 that others measured; nothing is fitted to them."""
    path = shipped_path("models", "deepseek-r1")
    assert path is not None
    cost = CostModel(ModelSpec.from_config(json.loads(path.read_text())), Mesh(tp=8), find_hardware("8xh200"))
    for who, number, context, host, measured_ms in MEASURED_STEPS:
        (ranks,) = cost.stage_times([GroupLoad(number, number, number * context, number * context)])
        predicted_ms = 1e3 * (ranks.total + host * cost.host_s(number))
        print(f"{who}: {number} sequences, context {context}: {measured_ms} ms measured, {predicted_ms:.1f} predicted")


def order() -> None:
    for model, placements in ORDERS:
        began = time.monotonic()
        times = seconds(model, "8xh200", placements)
        told = ", ".join(f"{name} {value:.0f} s" for name, value in sorted(times.items(), key=lambda item: item[1]))
        print(f"{model}: {told} ({time.monotonic() - began:.0f} s to simulate)", flush=True)


def sensitivity() -> None:
    names = ("cut", "ranks_overhead_s", "stage_overhead_s", "sequences", "bandwidth_efficiency", "flops_efficiency",
             "link_efficiency", "layer_overhead_s", "step_overhead_s", "sequence_overhead_s")  # fmt: skip
    print("| constant | factor | 32B DP4xTP2 | TP8 | DP8 | order | 14B DP8 | DP4xTP2 |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        for factor in (0.8, 1.2):
            if name == "bandwidth_efficiency" and factor > 1:
                factor = 1 / 0.85  # a share: all of it
            times = seconds("qwen2.5-32b", "8xh200", ("DP4xTP2", "TP8", "DP8"), **{name: factor})
            held = "held" if times["DP4xTP2"] < times["TP8"] < times["DP8"] else "lost"
            told = " | ".join(f"{times[each]:.0f}" for each in ("DP4xTP2", "TP8", "DP8"))
            small = seconds("qwen2.5-14b", "8xh200", ("DP8", "DP4xTP2"), **{name: factor})
            told += f" | {held} | {small['DP8']:.0f} | {small['DP4xTP2']:.0f}"
            print(f"| {name} | {factor:.2f} | {told} |", flush=True)


if __name__ == "__main__":
    PARTS: dict[str, Callable[[], None]] = {"table": table, "order": order, "steps": steps, "sensitivity": sensitivity}
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
