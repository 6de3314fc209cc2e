"""From a configuration to what the ranks will be told, or to the one sentence that says why not; nothing starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ridgewalk.app import PlannedPlacement, build_application, needed_cpus, resolve
from ridgewalk.config import ConfigError, ServeConfig, parse_config
from ridgewalk.placement.expert_load import ExpertLoad, write_expert_load
from ridgewalk.replica.engine_config import describe_expert_balance, describe_mesh
from ridgewalk.zoo import zoo_path
from tests.small_configs import SMALL_MOE

NUM_EXPERTS, NUM_LAYERS = 8, 4


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a Qwen3-MoE with everything but its weights, which planning does not read."""
    folder = tmp_path_factory.mktemp("sparse")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((zoo_path("demo-dense") / name).read_bytes())
    dense = json.loads((zoo_path("demo-dense") / "config.json").read_text())
    config = {**SMALL_MOE, "vocab_size": dense["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def configuration(model: Path | str, **placement: object) -> ServeConfig:
    return parse_config({"models": [{"model": str(model), "placements": [{"memory": "64MiB", **placement}]}]})


def plan(model: Path | str, **placement: object) -> PlannedPlacement:
    (planned,) = resolve(configuration(model, **placement))[0].placements
    return planned


def skewed_loads(path: Path) -> Path:
    write_expert_load(path, ExpertLoad("sparse", NUM_EXPERTS, [[700, 100, 50, 50, 25, 25, 25, 25]] * NUM_LAYERS))
    return path


EP2 = {"data_parallel_size": 2, "enable_expert_parallel": True}


def test_the_mesh_of_a_sparse_model_reaches_the_ranks_whole(sparse: Path) -> None:
    shape = {**EP2, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    planned = plan(sparse, **shape)
    assert planned.replicas == 1
    config = planned.engine.runner_config(rank=5, num_threads=1)
    assert (config.mesh.dp, config.mesh.pp, config.mesh.tp, config.mesh.expert_parallel) == (2, 2, 2, True)
    assert not config.tokens_broadcast  # a pipeline schedules nothing ahead
    assert describe_mesh(planned.engine) == "8 ranks: 2 stages x 2 attention groups x 2 tensor-parallel, experts over 4"
    assert planned.memory_plan is not None
    scheduler = planned.engine.scheduler_config(planned.memory_plan)
    assert (scheduler.num_groups, scheduler.max_steps_in_flight, scheduler.schedule_ahead) == (2, 2, False)
    assert needed_cpus(configuration(sparse, **shape)) == 8 + 0.5 + 0.5


def test_without_expert_parallelism_data_parallelism_is_replicas(sparse: Path) -> None:
    planned = plan(sparse, data_parallel_size=2, tensor_parallel_size=2)
    assert (planned.replicas, planned.engine.world_size, planned.engine.placement) == (2, 2, "DP2xTP2")


def test_there_is_a_bundle_for_each_stage_and_tensor_parallel_group(sparse: Path) -> None:
    config = configuration(sparse, **EP2, tensor_parallel_size=2, pipeline_parallel_size=2, cpus_per_rank=3)
    application = build_application(config, resolve(config))
    (handles,) = application._bound_deployment.init_args[1].values()
    (engine,) = handles.values()
    bundles = engine._bound_deployment._replica_config.placement_group_bundles
    assert bundles == [{"CPU": 0.5}, *[{"CPU": 6.0}] * 4]


def test_redundant_experts_are_placed_by_the_observed_load(sparse: Path, tmp_path: Path) -> None:
    loads = skewed_loads(tmp_path / "loads.json")
    planned = plan(sparse, **EP2, num_redundant_experts=2, expert_load=str(loads))
    engine = planned.engine
    assert engine.expert_map is not None
    assert engine.expert_imbalance is not None
    for layer in engine.expert_map:
        assert [len(slots) for slots in layer] == [5, 5]
        assert {expert for slots in layer for expert in slots} == set(range(NUM_EXPERTS))
        assert sum(0 in slots for slots in layer) == 2  # the busiest
    before, after = engine.expert_imbalance
    assert before == pytest.approx(900 / 500)
    assert after < 1.1
    assert f"{before:.2f}" in describe_expert_balance(engine)
    assert describe_expert_balance(plan(sparse, **EP2).engine) == ""


def test_loads_without_redundancy_still_place_the_experts(sparse: Path, tmp_path: Path) -> None:
    engine = plan(sparse, **EP2, expert_load=str(skewed_loads(tmp_path / "loads.json"))).engine
    assert engine.expert_map is not None
    assert all(sorted(expert for slots in layer for expert in slots) == list(range(8)) for layer in engine.expert_map)


def test_redundant_experts_take_memory(sparse: Path, tmp_path: Path) -> None:
    loads = skewed_loads(tmp_path / "loads.json")
    plain = plan(sparse, **EP2).memory_plan
    redundant = plan(sparse, **EP2, num_redundant_experts=2, expert_load=str(loads)).memory_plan
    assert plain is not None
    assert redundant is not None
    one_expert = 3 * 64 * 32 * 2  # gate, up and down in bfloat16
    assert redundant.weight_bytes - plain.weight_bytes == NUM_LAYERS * one_expert


def test_what_only_fits_in_fp8_is_left_to_ranks_on_gpus(sparse: Path, tmp_path: Path) -> None:
    """Their devices may multiply FP8; the CPU of this machine does not."""
    for file in sparse.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((sparse / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    on_cpu, on_gpu = (plan(tmp_path, gpus_per_rank=gpus, memory="256MiB").memory_plan for gpus in (0, 1))
    assert on_cpu is not None
    assert on_gpu is not None
    assert on_gpu.weight_bytes < on_cpu.weight_bytes == plan(sparse).memory_plan.weight_bytes


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"data_parallel_size": 3, "enable_expert_parallel": True}, "experts"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 5}, "pipeline_parallel_size"),
        ({**EP2, "memory": "100KiB"}, "raise --memory"),
    ],
)
def test_what_does_not_fit_a_sparse_model_is_one_sentence(
    sparse: Path, placement: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(sparse, **placement)


def test_loads_of_another_model_and_a_number_that_does_not_divide_are_refused(sparse: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    write_expert_load(other, ExpertLoad("other", 4, [[1] * 4] * NUM_LAYERS))
    with pytest.raises(ConfigError, match=r"other.json is of other.*record it anew"):
        plan(sparse, **EP2, num_redundant_experts=2, expert_load=str(other))
    with pytest.raises(ConfigError, match=r"none.json cannot be read"):
        plan(sparse, **EP2, expert_load=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="num_redundant_experts"):
        plan(sparse, **EP2, num_redundant_experts=3, expert_load=str(skewed_loads(tmp_path / "loads.json")))


def test_a_dense_model_has_no_experts_to_spread() -> None:
    with pytest.raises(ConfigError, match="dense"):
        plan("demo-dense", **EP2)
    planned = plan("demo-dense", pipeline_parallel_size=2, tensor_parallel_size=2)
    assert planned.engine.placement == "PP2xTP2"


def test_a_file_to_record_to_is_looked_at_before_anything_starts(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "loads.json"
    recording = {**EP2, "record_expert_load": str(path)}
    assert plan(sparse, **recording).engine.record_expert_load == str(path)
    write_expert_load(path, ExpertLoad(sparse.name, NUM_EXPERTS, [[1] * NUM_EXPERTS] * NUM_LAYERS))
    plan(sparse, **recording)  # can be added to
    for load in (ExpertLoad("other", 8, [[1] * 8] * NUM_LAYERS), ExpertLoad(sparse.name, 4, [[1] * 4] * NUM_LAYERS)):
        write_expert_load(path, load)
        with pytest.raises(
            ConfigError, match=f"record_expert_load: {path} is of {load.model}.*; name another file, or"
        ):
            plan(sparse, **recording)
        resolve(configuration(sparse, **recording), cluster_hosts=2)  # another machine's file, for all one knows
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"loads.json is no file of expert loads.*remove this one"):
        plan(sparse, **recording)
    path.unlink()
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written; make it writable"):
        plan(sparse, **recording)


def test_a_path_that_nothing_can_be_recorded_to_is_refused(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory; name a file in it"):
        plan(sparse, **EP2, record_expert_load=str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no directory .*none; make it first"):
        plan(sparse, **EP2, record_expert_load=str(tmp_path / "none" / "loads.json"))
    resolve(configuration(sparse, **EP2, record_expert_load=str(tmp_path / "none" / "loads.json")), cluster_hosts=2)


def test_cpus_are_checked_where_they_are_known_and_shared_by_all_bound_to_them(sparse: Path) -> None:
    here = sorted(os.sched_getaffinity(0))
    engine = plan(sparse, replicas=3, cpus=here).engine
    assert (engine.cpus, engine.ranks_on_cpus) == (tuple(here), 3)
    with pytest.raises(ConfigError, match=r"cpus: a process on .* may not use 99999; there are "):
        plan(sparse, cpus=99_999)
    (elsewhere,) = resolve(configuration(sparse, replicas=3, cpus=99_999), cluster_hosts=2)[0].placements
    assert (elsewhere.engine.cpus, elsewhere.engine.ranks_on_cpus) == ((99_999,), 2)
