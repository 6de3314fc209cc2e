"""Models without placements: planned where the hardware is known, one rank where it is not, and told why."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ridgewalk import machine
from ridgewalk.config import ConfigError, ServeConfig, parse_config
from ridgewalk.placement.data_files import shipped_path
from ridgewalk.placement.hardware import HardwareSpec
from ridgewalk.planning.startup import plan_missing


def configuration(*models: dict[str, object], **fields: object) -> ServeConfig:
    return parse_config({"models": list(models), **fields})


def names(config: ServeConfig) -> list[list[str]]:
    return [[placement.name for placement in model.placements] for model in config.models]


@pytest.fixture(autouse=True)
def uncalibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine's calibration would be; there is none."""
    path = tmp_path / "this-machine.yaml"
    monkeypatch.setattr("ridgewalk.placement.hardware.calibration_path", lambda: path)
    assert machine.calibration_path() != path
    return path


def test_stated_placements_are_left_alone() -> None:
    config = configuration({"model": "demo-dense", "placements": [{"replicas": 3}]}, hardware="no such thing")
    planned = plan_missing(config, True)
    assert planned.config is config
    assert planned.sentences == []


def test_where_nothing_is_known_it_is_one_rank_and_says_what_to_do() -> None:
    planned = plan_missing(configuration({"model": "demo-dense"}), True)
    assert names(planned.config) == [["TP1"]]
    assert "ridgewalk calibrate" in planned.sentences[0]


def test_a_placement_is_planned_for_the_hardware_and_the_reason_told() -> None:
    planned = plan_missing(configuration({"model": "demo-moe", "max_num_seqs": 64}, hardware="2xh200"), False)
    (placement,) = planned.config.models[0].placements
    assert placement.num_replicas * placement.mesh.world_size == 2
    assert placement.gpus_per_rank == 1
    assert planned.sentences[0].startswith(f"demo-moe: {placement.name} of ")
    assert "best: " in planned.sentences[0]


def test_this_machine_is_planned_for_once_it_is_calibrated(uncalibrated: Path) -> None:
    shipped = shipped_path("hardware", "h100")
    assert shipped is not None
    described = yaml.safe_load(shipped.read_text())
    described["flops"]["float32"] = 1e12
    uncalibrated.write_text(yaml.safe_dump({**described, "devices_per_node": 2, "device": "cpu"}))
    config = configuration({"model": "demo-dense", "max_num_seqs": 16})
    assert "best: " in plan_missing(config, True).sentences[0]
    assert "best: " not in plan_missing(config, False).sentences[0]  # it will run elsewhere


def test_models_share_what_the_stated_placements_leave() -> None:
    stated = {"model": "demo-moe", "placements": [{"replicas": 2}]}
    planned = plan_missing(configuration({"model": "demo-dense", "max_num_seqs": 16}, stated, hardware="3xh200"), False)
    assert names(planned.config) == [["TP1"], ["DP2"]]


def test_models_of_one_machine_share_its_cores_and_memory(uncalibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = shipped_path("hardware", "h100")
    assert shipped is not None
    described = yaml.safe_load(shipped.read_text())
    described["flops"]["float32"] = 1e12
    uncalibrated.write_text(yaml.safe_dump({**described, "devices_per_node": 4, "device": "cpu"}))
    seen: list[int] = []
    shared_by = HardwareSpec.shared_by

    def noted(hardware: HardwareSpec, num_ranks: int, num_replicas: int | None = None) -> HardwareSpec:
        if num_replicas is not None:
            seen.append(num_ranks)
        return shared_by(hardware, num_ranks, num_replicas)

    monkeypatch.setattr(HardwareSpec, "shared_by", noted)
    model = {"model": "demo-dense", "max_num_seqs": 16}
    planned = plan_missing(configuration(model, {**model, "name": "again"}), True)
    assert len(names(planned.config)) == 2
    assert min(seen) == 4  # two ranks have two of the other model beside them, and not the whole machine


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ({}, {"hardware": "8xh300"}, "hardware: there is no hardware"),
        ({"workload": "poetry"}, {"hardware": "h200"}, "workload: there is no workload 'poetry'"),
        ({"model": "/nowhere"}, {"hardware": "h200"}, "nowhere"),
        ({}, {"hardware": "h200", "models": "one more"}, "leaves none for demo-dense"),
    ],
)
def test_what_cannot_be_planned_names_its_field(
    model: dict[str, object], fields: dict[str, object], message: str
) -> None:
    models: list[dict[str, object]] = [{"model": "demo-dense", **model}]
    if fields.pop("models", None):
        models.append({"model": "demo-moe", "placements": [{}]})
    with pytest.raises(ConfigError, match=message):
        plan_missing(configuration(*models, **fields), False)
