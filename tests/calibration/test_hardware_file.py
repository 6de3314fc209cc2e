"""The file that a calibration writes: it says what was measured, and reads as hardware."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml

from ridgewalk.calibration.engine_probe import StepsTask, small_shape
from ridgewalk.calibration.figures import CollectiveRates, KernelRates, Overheads, RankFigures
from ridgewalk.calibration.hardware_file import HOW, as_yaml, expert_fill, hardware_spec, rank_rates
from ridgewalk.calibration.kernel_probes import EXPERT_HIDDEN, EXPERT_INNER, SLICES
from ridgewalk.placement.cost_model import CostModel, GroupLoad, expert_stretch
from ridgewalk.placement.hardware import HardwareSpec, find_hardware
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec

COLLECTIVES = CollectiveRates(4e-6, 3e9, 1e-5, 7e9, 0.04)
OVERHEADS = Overheads(step_s=1e-3, sequence_s=2e-6, layer_s=3e-5)


def figures(factor: float = 1.0, alone: bool = True) -> RankFigures:
    rates = KernelRates(
        weight_bandwidth=16e9 * factor,
        product_flops={1: 16e9 * factor, 8: 40e9 * factor, 64: 50e9 * factor},
        attention_bandwidth={1: 8e9 * factor, 4: 4e9 * factor},
        attention_flops=25e9 * factor,
        latent_attention_flops=30e9 * factor,
        expert_flops={1: 18e9 * factor, 8: 42e9 * factor},
        sliced_expert_flops={8: 35e9 * factor},
        value_s=1e-8 / factor,
    )
    return RankFigures({"bfloat16": rates, "float32": rates}, None if alone else COLLECTIVES)


def machine() -> HardwareSpec:
    teams = {1: [figures(2.0)], 2: [figures(0.9, alone=False), figures(1.1, alone=False)]}
    rates = {count: rank_rates(ranks, OVERHEADS) for count, ranks in teams.items()}
    collectives = [rank.collectives for rank in teams[2] if rank.collectives is not None]
    return hardware_spec('a CPU with "quotes": 2 cores', 24 * 2**30, 0.5, 2**28, rates, collectives)


def test_the_file_says_what_was_measured_to_four_digits(tmp_path: Path) -> None:
    path, spec = tmp_path / "own.yaml", machine()
    path.write_text(as_yaml(spec, "Measured today."))
    read = find_hardware(str(path))
    assert close(read, spec)
    assert path.read_text().startswith("# Measured today.\n")


def close(one: object, other: object) -> bool:
    """Whether two trees of values are equal but for rounding."""
    if isinstance(one, msgspec.Struct):
        return close(msgspec.to_builtins(one), msgspec.to_builtins(other))
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
        )
    return one == other if isinstance(one, str | bool | None) else one == pytest.approx(other, rel=1e-3)


def test_every_constant_has_a_comment_on_how_it_was_measured() -> None:
    text = as_yaml(machine(), "note")
    lines = text.splitlines()
    for name in yaml.safe_load(text):
        if name not in ("about", "device"):
            above = lines[next(at for at, line in enumerate(lines) if line.startswith(f"{name}:")) - 1]
            assert above == f"# {HOW[name]}"


def test_a_rank_alone_has_the_whole_machine() -> None:
    spec = machine()
    alone = spec.shared_by(1)
    assert spec.num_devices == 2
    assert spec.memory_bandwidth == pytest.approx(16e9)  # the mean of its two ranks
    assert alone.memory_bandwidth == pytest.approx(32e9)
    assert alone.memory_bytes == 2 * spec.memory_bytes == 24 * 2**30
    assert alone.flops["bfloat16"] == 2 * spec.flops["bfloat16"]
    assert spec.shared_by(2) == spec
    assert spec.shared_by(3).memory_bytes == pytest.approx(8 * 2**30)  # a core for less than each
    assert alone.rank_budget(0.9) == 12 * 2**30 - 2**28  # what `serve` takes, not the policy's share


def test_one_replica_of_several_ranks_has_one_scheduler() -> None:
    teams = {1: [figures(2.0)], 2: [figures(0.9, alone=False), figures(1.1, alone=False)]}
    crowded = Overheads(step_s=3e-3, sequence_s=9e-6, layer_s=8e-5)
    rates = {1: rank_rates(teams[1], OVERHEADS), 2: rank_rates(teams[2], crowded)}
    spec = hardware_spec("two cores", 24 * 2**30, 0.5, 2**28, rates, [COLLECTIVES])
    one, two = spec.shared_by(2, 1), spec.shared_by(2, 2)
    assert (one.step_overhead_s, one.sequence_overhead_s, one.layer_overhead_s) == (1e-3, 2e-6, 8e-5)
    assert (two.step_overhead_s, two.sequence_overhead_s, two.layer_overhead_s) == (3e-3, 9e-6, 8e-5)
    assert one.memory_bandwidth == two.memory_bandwidth


@pytest.mark.parametrize("fill", [0.0, 3.0, 40.0, 380.0])
def test_what_experts_take_to_get_going_is_what_their_slices_are_slower_by(fill: float) -> None:
    whole, sliced = (expert_stretch(fill, EXPERT_HIDDEN, inner) for inner in (EXPERT_INNER, EXPERT_INNER / SLICES))
    assert expert_fill(sliced / whole) == pytest.approx(fill)


@pytest.mark.parametrize("slower", [0.9, 2.5, 10.0])
def test_slices_faster_than_whole_experts_or_slower_than_any_fill_makes_them_give_a_finite_one(slower: float) -> None:
    assert 0 <= expert_fill(slower) < 1000


def test_the_cost_model_gives_back_what_experts_took_of_every_dtype() -> None:
    """Ranks and dtypes whose slices are slower by different shares, or faster."""
    ranks = [figures(0.9, alone=False), figures(1.1, alone=False)]
    slower = [{8: 30e9}, {8: 20e9}]
    kernels = [
        {
            "bfloat16": msgspec.structs.replace(rank.kernels["bfloat16"], sliced_expert_flops=sliced),
            "float32": msgspec.structs.replace(rank.kernels["float32"], sliced_expert_flops={8: 60e9}),
        }
        for rank, sliced in zip(ranks, slower, strict=True)
    ]
    ranks = [msgspec.structs.replace(rank, kernels=each) for rank, each in zip(ranks, kernels, strict=True)]
    hardware = hardware_spec("", 1, 1.0, 0, {2: rank_rates(ranks, OVERHEADS)}, [COLLECTIVES])
    assert hardware.expert_fill > 0
    for dtype in ("bfloat16", "float32"):
        shape = small_shape(StepsTask(1, 2, Mesh(), (1,), 1, sparse=True))
        shape |= {"hidden_size": EXPERT_HIDDEN, "moe_intermediate_size": EXPERT_INNER, "num_experts": 4, "dtype": dtype}
        spec = ModelSpec.from_config(shape)
        fast = msgspec.structs.replace(hardware, expert_flops={dtype: {1: 1e30}})
        took, rest = (
            sum(CostModel(spec, Mesh(), each).stage_times([GroupLoad(8, 0, 0, 0)])[0][:2]) for each in (hardware, fast)
        )
        flops = 4 * 8 * 6 * EXPERT_HIDDEN * EXPERT_INNER
        assert took - rest == pytest.approx(flops / 42e9, rel=1e-3)  # the mean of the ranks


def test_a_machine_of_one_core_has_no_links() -> None:
    spec = hardware_spec("one core", 2**30, 0.5, 2**28, {1: rank_rates([figures()], OVERHEADS)}, [])
    assert spec.within_node is None
    assert spec.num_devices == 1
