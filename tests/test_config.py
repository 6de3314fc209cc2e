"""What users write, and what they are told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.config import ConfigError, load_config, parse_config, parse_cpus, parse_size

RECORDING = {"enable_expert_parallel": True, "record_expert_load": "/var/seen.json"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be a mapping"),
        ({}, "models: Field required"),
        ({"models": []}, "models: List should have at least 1"),
        ({"models": [{"model": "x", "placments": []}]}, r"models\[0\].placments: no such option"),
        ({"models": [{"model": "x", "placements": [{"replicas": 0}]}]}, r"models\[0\].placements\[0\].replicas: .*1"),
        ({"models": [{"model": "x", "placements": [{"pipeline_parallel_size": 0}]}]}, "pipeline_parallel_size"),
        (
            {"models": [{"model": "x", "admission": "hopeful"}]},
            r"admission: .*'prompt_only' or 'predictive'",
        ),
        (
            {"models": [{"model": "x", "placements": [{"record_expert_load": "f.json"}]}]},
            "record_expert_load needs enable_expert_parallel",
        ),
        (
            {"models": [{"model": "x", "placements": [{"expert_load": "f.json", "data_parallel_size": 2}]}]},
            "expert_load needs enable_expert_parallel",
        ),
        (
            {"models": [{"model": "x", "placements": [{"num_redundant_experts": 2, "enable_expert_parallel": True}]}]},
            "num_redundant_experts needs expert_load.*record_expert_load",
        ),
        ({"models": [{"model": "x", "placements": [{"memory": "2 potatoes"}]}]}, "write it as 2GiB"),
        ({"models": [{"model": "x", "placements": [{"memory": 5, "num_blocks": 5}]}]}, "exclude each other"),
        ({"models": [{"model": "x", "dtype": "int8"}]}, r"models\[0\].dtype"),
        (
            {"models": [{"model": "x", "slo_tpot_ms": 20, "routing": "round_robin"}]},
            "need routing kv_growth; round_robin heeds neither",
        ),
        (
            {"models": [{"model": "x", "swap_space": "1GiB", "enable_prefix_caching": False}]},
            "swap_space needs enable_prefix_caching",
        ),
        ({"models": [{"model": "x", "swap_space": "0.5"}]}, r"models\[0\].swap_space: .*less than one byte"),
        ({"models": [{"model": "x", "slo_tpot_ms": 0}]}, r"models\[0\].slo_tpot_ms: .*greater than 0"),
        ({"models": [{"model": "x"}, {"model": "x"}]}, "two models are called 'x'"),
        ({"models": [{"model": "x", "placements": [{}, {}]}]}, "lists a placement twice"),
        ({"models": [{"model": "x"}], "port": 99999}, "port"),
        ({"models": [{"model": "x", "placements": [{"peak_flops_per_rank": 0}]}]}, "peak_flops_per_rank: .*0"),
        ({"models": [{"model": "x", "placements": [{"peak_bandwidth_per_rank": "fast"}]}]}, "peak_bandwidth_per_rank"),
        (
            {"models": [{"model": name, "placements": [RECORDING]} for name in "xy"]},
            "two placements record to /var/seen.json; give each its own file",
        ),
        (
            {"models": [{"model": "x", "placements": [RECORDING, {**RECORDING, "data_parallel_size": 2}]}]},
            "two placements record to",
        ),
    ],
)
def test_errors_name_the_field(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(data)


def test_dense_data_parallelism_is_replicas() -> None:
    config = parse_config({"models": [{"model": "x", "placements": [{"data_parallel_size": 2, "replicas": 2}]}]})
    placement = config.models[0].placements[0]
    assert (placement.num_replicas, placement.mesh.world_size, placement.name) == (4, 1, "DP4")


@pytest.mark.parametrize(
    ("shape", "replicas", "ranks", "name"),
    [
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, 1, 4, "PP2xTP2"),
        ({"pipeline_parallel_size": 2, "data_parallel_size": 2}, 2, 2, "DP2xPP2"),
        ({"data_parallel_size": 2, "enable_expert_parallel": True}, 1, 2, "DP2xEP2"),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True}, 1, 4, "DP2xTP2xEP4"),
        ({"replicas": 3, "data_parallel_size": 2, "enable_expert_parallel": True}, 3, 2, "3xDP2xEP2"),
        ({"enable_expert_parallel": True, "pipeline_parallel_size": 2, "tensor_parallel_size": 2}, 1, 4, "PP2xTP2xEP2"),
    ],
)
def test_shapes_of_a_placement(shape: dict[str, object], replicas: int, ranks: int, name: str) -> None:
    """Data parallelism is inside the replica only with expert parallelism: else it is replicas."""
    config = parse_config({"models": [{"model": "x", "placements": [shape]}]})
    placement = config.models[0].placements[0]
    assert (placement.num_replicas, placement.mesh.world_size, placement.name) == (replicas, ranks, name)
    assert config.num_ranks == replicas * ranks


def test_paths_of_expert_loads_do_not_depend_on_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = {"enable_expert_parallel": True, "expert_load": "seen.json", "record_expert_load": "new/seen.json"}
    placement = parse_config({"models": [{"model": "x", "placements": [shape]}]}).models[0].placements[0]
    assert (placement.expert_load, placement.record_expert_load) == (tmp_path / "seen.json", tmp_path / "new/seen.json")


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("models: [")
    with pytest.raises(ConfigError, match=r"broken.yaml is not YAML"):
        load_config(broken)


@given(st.integers(1, 10**6), st.sampled_from([("GiB", 2**30), ("MB", 10**6), ("", 1), ("g", 2**30), ("KiB", 2**10)]))
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}") == number * unit[1]
    assert parse_size(f" {number} {unit[0]} ") == number * unit[1]


@pytest.mark.parametrize("none", [0, "0", "0GiB"])
def test_no_swap_space_is_no_default(none: object) -> None:
    fields = {"model": "x", "swap_space": none, "enable_prefix_caching": False}
    assert parse_config({"models": [fields]}).models[0].swap_space == 0
    assert parse_config({"models": [{"model": "x"}]}).models[0].swap_space is None


@given(st.sets(st.integers(0, 300), min_size=1))
def test_cpus_are_read_as_taskset_writes_them(numbers: set[int]) -> None:
    ordered = sorted(numbers)
    ranges = [
        f"{first}-{last}" if last > first else f"{first}"
        for first in ordered
        if first - 1 not in numbers
        for last in [next(n for n in ordered if n >= first and n + 1 not in numbers)]
    ]
    assert parse_cpus(", ".join(ranges)) == tuple(ordered)
    (model,) = parse_config({"models": [{"model": "x", "placements": [{"cpus": [*ordered, *ordered]}]}]}).models
    assert model.placements[0].cpus == tuple(ordered)


@pytest.mark.parametrize("text", ["", "3-1", "a", "-1", "1,,2", "0-", True, [], [-1], 1.5])
def test_what_is_no_list_of_cpus_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match=r"models\[0\].placements\[0\].cpus"):
        parse_config({"models": [{"model": "x", "placements": [{"cpus": text}]}]})


def test_ranks_bound_to_some_of_the_same_cpus_share_them() -> None:
    placements = [
        {"replicas": 3, "cpus": "0-3"},
        {"tensor_parallel_size": 2, "cpus": "3-5"},
        {"tensor_parallel_size": 4},
    ]
    config = parse_config({"models": [{"model": "x", "placements": placements}]})
    assert [config.num_ranks_bound_to(cpus) for cpus in [(0,), (3,), (5, 6), (7,), ()]] == [3, 5, 2, 0, 0]


def test_limits_of_a_step_follow_the_device_where_nobody_states_them() -> None:
    model = parse_config({"models": [{"model": "x", "max_num_seqs": 7}]}).models[0]
    assert model.engine_limits("cpu") == (7, 2048)
    assert model.engine_limits("cuda") == (7, 8192)
    assert parse_config({"models": [{"model": "x"}]}).models[0].engine_limits("cuda").max_num_seqs == 1024
