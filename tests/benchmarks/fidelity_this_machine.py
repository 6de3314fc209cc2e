"""How near `ridgewalk plan` comes to this machine: predicted against measured throughput of real engines.

    python -m tests.benchmarks.fidelity_this_machine FOLDER [--hardware FILE] [--repeats 3] [--out FILE]

Calibrates first unless a hardware file is given. FOLDER gets the checkpoints `q50m` and `moe`. Placements of a model
take turns. A measured run is repeated at once, twice at most, where other programs took more than a little of the
cores; the quietest stands, the table says where it was disturbed too, and medians are compared.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import psutil

from ridgewalk.bench.lengths import LogNormalLengths
from ridgewalk.calibration.run import run_calibration
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.placement.hardware import HardwareSpec, find_hardware
from ridgewalk.placement.memory import plan_memory
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.planning.policy import Policy
from ridgewalk.planning.shape import Placement, Shape, parse_placement
from ridgewalk.planning.simulator import BLOCK_SIZE, Arrival, Outcome, Scene, simulate
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.offline import OfflineEngine
from ridgewalk.zoo.random_checkpoint import make_random_checkpoint

PLACEMENTS = {"q50m": ("TP1", "TP2", "DP2"), "moe": ("TP1", "TP2", "DP2", "DP2xEP2")}
REQUESTS, PROMPT, LONGEST = 24, 64, 192
OUTPUTS = LogNormalLengths(median=80, sigma=0.6, longest=LONGEST)
VOCABULARY = 16_000
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 64, 2048
AMPLE, SCARCE = REQUESTS * (PROMPT + LONGEST), 1024
"""Tokens of KV of all ranks together: room for every request at its longest, and a third of what they come to need."""

POLICY = Policy("offline", MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, 1.0, host_overlaps=True, admission="prompt_only")
QUIET = 0.05
"""Of the cores: what other programs may take in a run that counts."""

WARM_UP = 3
"""Requests that are not measured, before those that are."""

ATTEMPTS = 3
"""At most, until one is quiet."""


class Run(msgspec.Struct, frozen=True):
    """One measured run of a placement."""

    tokens_per_s: float
    preemptions: int
    recomputed_tokens: int
    others: float  # share of the cores that other programs took
    round: int  # of the placements' turns
    attempts: int = 1  # that it is the quietest of

    @property
    def counts(self) -> bool:
        """Other programs took little."""
        return self.others <= QUIET


class Measured(msgspec.Struct, frozen=True):
    """Runs of one placement with so much KV."""

    model: str
    placement: str
    kv_tokens: int
    runs: list[Run]

    @property
    def quiet(self) -> bool:
        """All of them count."""
        return all(run.counts for run in self.runs)

    @property
    def tokens_per_s(self) -> float:
        """The median."""
        return statistics.median(run.tokens_per_s for run in self.runs)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    measured: Measured
    predicted: float  # tokens/s
    preemptions: int  # predicted

    @property
    def error(self) -> float:
        """Of the prediction, signed."""
        return self.predicted / self.measured.tokens_per_s - 1


def load() -> list[Arrival]:
    """A closed batch; all at once."""
    lengths = OUTPUTS.sample(REQUESTS, random.Random(0))
    return [Arrival(0.0, PROMPT, length) for length in lengths]


def blocks_per_group(kv_tokens: int, shape: Shape) -> int:
    """Blocks of each attention group, when so many tokens are divided among all."""
    return kv_tokens // BLOCK_SIZE // (shape.replicas * shape.mesh.dp)


def predict(spec: ModelSpec, hardware: HardwareSpec, placement: Placement, kv_tokens: int) -> Outcome:
    """As `ridgewalk plan` does, with just the memory that gives so much KV."""
    (shape,) = placement.shapes
    rank = hardware.shared_by(placement.num_devices, shape.replicas)
    limits = (BLOCK_SIZE, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, PROMPT + LONGEST)
    memory = plan_memory(spec, shape.mesh, spec.dtype, 2**62, *limits)
    needed = max(stage.used_bytes(blocks_per_group(kv_tokens, shape)) for stage in memory.stages)
    sized = msgspec.structs.replace(rank, memory_bytes=needed + 1, memory_share=1.0, process_bytes=0, by_ranks={})
    return simulate(Scene(spec, sized, POLICY, tuple(load())), placement)


class Replicas:
    """The engines of a placement, each in a process of its own with its ranks as children, ready to run."""

    def __init__(self, folder: Path, spec: ModelSpec, placement: Placement, kv_tokens: int) -> None:
        (shape,) = placement.shapes
        mesh = shape.mesh
        config = EngineConfig(
            model_name=folder.name,
            placement=placement.name,
            model_path=str(folder),
            dtype=spec.dtype,
            tp=mesh.tp,
            pp=mesh.pp,
            dp=mesh.dp,
            expert_parallel=mesh.expert_parallel,
            ranks_per_host=placement.num_devices,
            max_model_len=PROMPT + LONGEST,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            block_size=BLOCK_SIZE,
            admission="prompt_only",
            max_waiting=REQUESTS,
            num_blocks=blocks_per_group(kv_tokens, shape),
        )
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for replica in range(shape.replicas):
            own, others = context.Pipe()
            process = context.Process(target=_serve, args=(config, replica, shape.replicas, others))
            process.start()
            self._ends.append(own)
            self._processes.append(process)
        for end in self._ends:
            end.recv()

    def run(self, turn: int, attempt: int = 0) -> Run:
        """The whole load, each replica with its share; the prompts follow from turn and attempt."""
        busy, own = _busy_s(), self._own_s()
        for end in self._ends:
            end.send((turn, attempt))
        told = [end.recv() for end in self._ends]
        seconds = max(each["end"] for each in told) - min(each["begin"] for each in told)
        others = (_busy_s() - busy - (self._own_s() - own)) / seconds / psutil.cpu_count()
        tokens = sum(each["tokens"] for each in told)
        return Run(
            round(tokens / seconds, 1),
            sum(each["preemptions"] for each in told),
            sum(each["recomputed"] for each in told),
            round(max(0.0, others), 3),
            turn,
        )

    def close(self) -> None:
        """End them."""
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join()

    def _own_s(self) -> float:
        me = psutil.Process()
        return sum(sum(process.cpu_times()[:2]) for process in [me, *me.children(recursive=True)])


def _serve(config: EngineConfig, replica: int, replicas: int, end: Connection) -> None:
    share = load()[replica::replicas]  # as the simulator deals out a batch to equal replicas
    sampling = [SamplingParams(max_tokens=each.output_length, temperature=0.0) for each in share]
    with OfflineEngine(config, spawn=True) as engine:
        end.send("ready")
        while (told := end.recv()) is not None:
            turn, attempt = told
            # Prompts of an earlier run would be found in the prefix cache.
            rng = random.Random(f"{turn}-{attempt}-{replica}")
            count = WARM_UP if turn < 0 else len(share)
            prompts = [[rng.randrange(VOCABULARY) for _ in range(PROMPT)] for _ in range(count)]
            before = _counts(engine)
            begin = time.monotonic()
            engine.generate(prompts, sampling[:count])
            finish, after = time.monotonic(), _counts(engine)
            end.send(
                {
                    "begin": begin,
                    "end": finish,
                    "tokens": sum(each.output_length for each in share[:count]),
                    "preemptions": after[0] - before[0],
                    "recomputed": after[1] - before[1],
                }
            )


def _counts(engine: OfflineEngine) -> tuple[int, int]:
    counters = engine.core.scheduler.counters
    return counters.num_preemptions, counters.recomputed_tokens


def measure(placements: Mapping[str, Replicas], repeats: int) -> dict[str, list[Run]]:
    """Of each, a run in every turn: a machine that is slower for a while is so for all of them."""
    runs: dict[str, list[Run]] = {name: [] for name in placements}
    for replicas in placements.values():
        replicas.run(turn=-1)
    for turn in range(repeats):
        for name, replicas in placements.items():
            runs[name].append(_quiet_run(replicas, turn))
    return runs


def _quiet_run(replicas: Replicas, turn: int) -> Run:
    """The first of some attempts that counts, or the quietest. All at once: later the pace may be another."""
    attempts: list[Run] = []
    while len(attempts) < ATTEMPTS and not any(run.counts for run in attempts):
        _await_quiet()
        attempts.append(replicas.run(turn, len(attempts)))
    quietest = min(attempts, key=lambda run: run.others)
    return msgspec.structs.replace(quietest, attempts=len(attempts))


def _await_quiet(patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while psutil.cpu_percent(0.5) > 100 * QUIET and time.monotonic() < deadline:
        pass


def _busy_s() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait


def measure_all(folder: Path, models: Sequence[str], only: Sequence[str], repeats: int) -> list[Measured]:
    """Every placement of every model with ample and with scarce KV."""
    found = []
    for model in models:
        spec = ModelSpec.from_folder(folder / model)
        names = [name for name in PLACEMENTS[model] if not only or name in only]
        for kv_tokens in (AMPLE, SCARCE):
            with ExitStack() as stack:
                running: dict[str, Replicas] = {}
                for name in names:
                    running[name] = Replicas(folder / model, spec, parse_placement(name), kv_tokens)
                    stack.callback(running[name].close)
                told = measure(running, repeats)
            for name, runs in told.items():
                found.append(Measured(model, name, kv_tokens, runs))
                print(found[-1], file=sys.stderr, flush=True)
    return found


def compare(folder: Path, hardware: HardwareSpec, measured: Sequence[Measured]) -> list[Row]:
    """Set a prediction beside each measurement."""
    specs = {model: ModelSpec.from_folder(folder / model) for model in {each.model for each in measured}}
    outcomes = [
        predict(specs[each.model], hardware, parse_placement(each.placement), each.kv_tokens) for each in measured
    ]
    return [
        Row(each, outcome.throughput_tokens_per_s, outcome.preemptions)
        for each, outcome in zip(measured, outcomes, strict=True)
    ]


def together(measured: Sequence[Measured]) -> list[Measured]:
    """Runs of several sittings as of one."""
    found: dict[tuple[str, str, int], Measured] = {}
    for each in measured:
        key = each.model, each.placement, each.kv_tokens
        before = found.get(key)
        found[key] = each if before is None else msgspec.structs.replace(before, runs=before.runs + each.runs)
    return list(found.values())


def _numbered(measured: Measured, sitting: int) -> Measured:
    """With rounds that no other sitting has."""
    runs = [msgspec.structs.replace(run, round=sitting * 1000 + run.round) for run in measured.runs]
    return msgspec.structs.replace(measured, runs=runs)


def told_apart(one: Measured, other: Measured) -> bool:
    """Whether the first is faster than the second by a sign test of their rounds, one-sided at 5 %."""
    theirs = {run.round: run for run in other.runs}
    rounds = [(run, theirs[run.round]) for run in one.runs if run.round in theirs]
    won = sum(mine.tokens_per_s > its.tokens_per_s for mine, its in rounds)
    return sum(math.comb(len(rounds), count) for count in range(won, len(rounds) + 1)) <= 0.05 * 2 ** len(rounds)


def line(row: Row) -> str:
    """Of the Markdown table."""
    measured = row.measured
    preempted = statistics.median(run.preemptions for run in measured.runs)
    runs = ", ".join(f"{run.tokens_per_s:.0f}" for run in measured.runs)
    note = "" if measured.quiet else f"disturbed: others took up to {max(run.others for run in measured.runs):.1%}"
    return (
        f"| {measured.model} | {measured.placement} | {measured.kv_tokens:,} | {row.predicted:.0f} | "
        f"{measured.tokens_per_s:.0f} ({runs}) | {row.error:+.0%} | {row.preemptions} | {preempted:.0f} | {note} |"
    )


def summary(rows: Sequence[Row]) -> str:
    """Errors and orders."""
    told = [f"median error {statistics.median(abs(row.error) for row in rows):.1%} of {len(rows)}"]
    for model in dict.fromkeys(row.measured.model for row in rows):
        for kv_tokens in (AMPLE, SCARCE):
            some = [row for row in rows if (row.measured.model, row.measured.kv_tokens) == (model, kv_tokens)]
            apart = [(fast, slow) for fast in some for slow in some if told_apart(fast.measured, slow.measured)]
            right = sum(fast.predicted > slow.predicted for fast, slow in apart)
            predicted = [row.measured.placement for row in sorted(some, key=lambda row: -row.predicted)]
            measured = [row.measured.placement for row in sorted(some, key=lambda row: -row.measured.tokens_per_s)]
            verdict = "same order" if predicted == measured else "another order"
            told.append(
                f"{model}, {kv_tokens:,}: {verdict}; "
                f"predicted {' > '.join(predicted)}, measured {' > '.join(measured)}; "
                f"{right} of {len(apart)} pairs that rounds tell apart are in the right order"
            )
    return "\n".join(told)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hardware", type=Path, help="a file of an earlier calibration")
    parser.add_argument("--measured", type=Path, nargs="+", help="files of earlier runs, instead of running")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=list(PLACEMENTS), choices=list(PLACEMENTS))
    parser.add_argument("--placements", nargs="+", default=[], help="only these")
    parser.add_argument("--out", type=Path, help="write the runs, for --measured")
    arguments = parser.parse_args()
    for model in arguments.models:
        if not (arguments.folder / model).exists():
            make_random_checkpoint(model, arguments.folder / model)
    hardware = arguments.hardware or arguments.folder / "this-machine.yaml"
    if arguments.hardware is None:
        _await_quiet()
        run_calibration(hardware)
    if arguments.measured:
        read = [msgspec.json.decode(path.read_bytes(), type=list[Measured]) for path in arguments.measured]
        measured = together([_numbered(each, sitting) for sitting, found in enumerate(read) for each in found])
    else:
        measured = measure_all(arguments.folder, arguments.models, arguments.placements, arguments.repeats)
    if arguments.out is not None:
        arguments.out.write_bytes(msgspec.json.encode(measured))
    rows = compare(arguments.folder, find_hardware(str(hardware)), measured)
    print(
        "| model | placement | KV tokens | predicted tokens/s | measured (runs) | error | preemptions: predicted",
        end="",
    )
    print(" | measured | |\n|---|---|---|---|---|---|---|---|---|")
    print("\n".join(map(line, rows)))
    print(summary(rows))


if __name__ == "__main__":
    main()
