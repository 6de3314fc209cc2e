"""Hardware by name or file, and the shapes of public models."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from ridgewalk.machine import calibration_path
from ridgewalk.placement.data_files import shipped_names, shipped_path
from ridgewalk.placement.hardware import HardwareError, RankRates, find_hardware
from ridgewalk.placement.model_spec import ModelSpec


def test_a_name_says_nodes_devices_and_kind() -> None:
    one, node, cluster = find_hardware("h200"), find_hardware("8xh200"), find_hardware("2x8xH200")
    assert (one.num_nodes, one.num_devices) == (1, 1)
    assert (node.num_nodes, node.num_devices) == (1, 8)
    assert (cluster.num_nodes, cluster.num_devices) == (2, 16)
    assert cluster.link(8) == cluster.within_node
    assert cluster.link(9) == cluster.between_nodes


def test_rates_are_dense_ones() -> None:
    for name in ("h200", "h100"):
        flops = find_hardware(name).flops
        assert (flops["bfloat16"], flops["float8"]) == (989e12, 1979e12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8xh300", "there is no hardware '8xh300'.*kinds: h100, h200"),
        ("0xh200", "there is no hardware"),
        ("16xh200", "a node of h200 holds 8; write .* 2x8xh200"),
        ("nowhere.yaml", "nowhere.yaml cannot be read"),
    ],
)
def test_hardware_that_is_not_there_is_refused_in_a_sentence(text: str, says: str) -> None:
    with pytest.raises(HardwareError, match=says):
        find_hardware(text)


def test_a_file_is_hardware_too_and_its_faults_are_named(tmp_path: Path) -> None:
    shipped = shipped_path("hardware", "h200")
    assert shipped is not None
    own = tmp_path / "own.yaml"
    own.write_text(shipped.read_text().replace("devices_per_node: 8", "devices_per_node: 4"))
    assert find_hardware(str(own)).num_devices == 4
    own.write_text(shipped.read_text().replace("memory_bandwidth: 4.8e+12", "memory_bandwidth: fast"))
    with pytest.raises(HardwareError, match="memory_bandwidth"):
        find_hardware(str(own))
    own.write_text(shipped.read_text() + "by_ranks: {1: {memory_bandwidth: 1.0}}\n")  # as from an earlier version
    with pytest.raises(HardwareError, match=r"missing required field.*; if `ridgewalk calibrate` wrote it, let it"):
        find_hardware(str(own))
    own.write_text("a: [")
    with pytest.raises(HardwareError, match="is not YAML"):
        find_hardware(str(own))


def test_this_machine_is_what_calibrate_has_written_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGEWALK_CACHE", str(tmp_path))
    with pytest.raises(HardwareError, match="this-machine has not been measured; run `ridgewalk calibrate` once"):
        find_hardware("this-machine")
    shipped = shipped_path("hardware", "h200")
    assert shipped is not None
    calibration_path().write_text(shipped.read_text())
    assert find_hardware("this-machine") == find_hardware("8xh200")
    calibration_path().write_text(shipped.read_text().replace("flops:", "flips:"))
    with pytest.raises(HardwareError, match=r"flips.*; run `ridgewalk calibrate` again"):
        find_hardware("this-machine")


def test_several_nodes_need_a_link_between_them(tmp_path: Path) -> None:
    shipped = shipped_path("hardware", "h200")
    assert shipped is not None
    lines = [line for line in shipped.read_text().splitlines() if not line.startswith("between_nodes")]
    own = tmp_path / "own.yaml"
    own.write_text("\n".join([*lines, "num_nodes: 2"]))
    with pytest.raises(HardwareError, match="several nodes need between_nodes"):
        find_hardware(str(own))


def test_ranks_between_two_measured_numbers_have_what_the_greater_one_left_each() -> None:
    h200 = find_hardware("8xh200")
    shared = msgspec.structs.replace(h200, by_ranks={1: rates(8e12), 2: rates(6e12), 4: rates(5e12)})
    found = {count: shared.shared_by(count).memory_bandwidth for count in (1, 2, 3, 4, 5, 8)}
    assert found == {1: 8e12, 2: 6e12, 3: 5e12, 4: 5e12, 5: 4.8e12, 8: 4.8e12}
    assert h200.shared_by(1) == h200  # a device that no rank shares


def rates(bandwidth: float) -> RankRates:
    return RankRates(
        memory_bandwidth=bandwidth,
        flops={"bfloat16": 1e15},
        product_shares={},
        attention_bandwidth={},
        attention_flops={},
        latent_attention_flops={},
        layer_overhead_s=0.0,
        value_overhead_s=0.0,
        step_overhead_s=0.0,
        sequence_overhead_s=0.0,
        sparse_layer_overhead_s=0.0,
        expert_flops={},
        expert_fill=0.0,
    )


PUBLISHED = {  # parameters, and those that a token passes where they are fewer
    "llama-3.1-8b": (8.03e9, None),
    "llama-3.1-70b": (70.6e9, None),
    "llama-3.1-405b": (405.9e9, None),
    "qwen2.5-14b": (14.8e9, None),
    "qwen2.5-32b": (32.8e9, None),
    "r1-distill-qwen-1.5b": (1.78e9, None),
    "r1-distill-qwen-7b": (7.62e9, None),
    "r1-distill-qwen-14b": (14.8e9, None),
    "r1-distill-qwen-32b": (32.8e9, None),
    "r1-distill-llama-8b": (8.03e9, None),
    "r1-distill-llama-70b": (70.6e9, None),
    "mixtral-8x7b": (46.7e9, 12.9e9),
    "qwen3-235b-a22b": (235e9, 22e9),
    "deepseek-r1": (671e9, 37e9),
}


def test_every_shipped_model_has_its_published_parameters() -> None:
    assert shipped_names("models") == sorted(PUBLISHED)
    for name, (parameters, active) in PUBLISHED.items():
        path = shipped_path("models", name)
        assert path is not None
        spec = ModelSpec.from_config(json.loads(path.read_text()))
        assert spec.num_parameters == pytest.approx(parameters, rel=3e-3), name
        assert spec.active_parameters == pytest.approx(active or parameters, rel=0.02), name
