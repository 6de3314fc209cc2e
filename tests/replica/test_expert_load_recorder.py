"""Tokens of slots become loads of experts, and these a file that a planner reads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ridgewalk.engine.step import RankTimings
from ridgewalk.placement.expert_load import ExpertLoad, read_expert_load
from ridgewalk.placement.expert_map import ExpertMap
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.placement.stages import stage_layers
from ridgewalk.replica import expert_load_recorder
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.expert_load_recorder import (
    ExpertLoadCounter,
    ExpertLoadRecorder,
    make_expert_load_recorder,
)
from tests.small_configs import SMALL_MOE

SPEC = ModelSpec.from_config({**SMALL_MOE, "mlp_only_layers": [1]})  # sparse: 0, 2, 3
MOE = SPEC.moe
assert MOE is not None
REDUNDANT = ExpertMap((((0, 1, 2, 3, 4), (0, 5, 6, 7, 4)),) * 3)


def timings(rank: int, expert_tokens: list[list[int]]) -> RankTimings:
    return RankTimings(0, rank, 0.0, {}, [], expert_tokens=expert_tokens)


def test_copies_of_an_expert_are_counted_together() -> None:
    counter = ExpertLoadCounter(SPEC, MOE, Mesh(dp=2, expert_parallel=True), REDUNDANT)
    step = [timings(0, [[1, 2, 3, 4, 5]] * 3), timings(1, [[10, 20, 30, 40, 50]] * 3)]
    counter.add(step)
    counter.add(step)
    assert counter.layers == [[22, 4, 6, 8, 110, 40, 60, 80]] * 3


def test_a_stage_reports_its_own_sparse_layers() -> None:
    """Ranks 0 and 1 are the first stage, 2 and 3 the second; each has half of the experts, in order."""
    counter = ExpertLoadCounter(SPEC, MOE, Mesh(tp=2, pp=2, expert_parallel=True), None)
    sizes = [sum(SPEC.is_sparse(layer) for layer in layers) for layers in stage_layers(SPEC, 2)]
    counter.add([timings(rank, [[rank, 0, 0, 10 * rank]] * sizes[rank // 2]) for rank in range(4)])
    first, second = [0, 0, 0, 0, 1, 0, 0, 10], [2, 0, 0, 20, 3, 0, 0, 30]
    assert counter.layers == [first] * sizes[0] + [second] * sizes[1]


def test_what_was_recorded_is_written_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "loads.json"
    counter = ExpertLoadCounter(SPEC, MOE, Mesh(expert_parallel=True), None)
    recorder = ExpertLoadRecorder("sparse", counter, path)
    recorder.on_timings([timings(0, [[1, 0, 0, 0, 0, 0, 0, 7]] * 3)])
    recorder.close()
    recorder.close()
    load = read_expert_load(path, MOE)
    assert (load.model, load.layers) == ("sparse", [[1, 0, 0, 0, 0, 0, 0, 7]] * 3)


def record(path: Path, tokens: int, model: str = "sparse", spec: ModelSpec = SPEC) -> None:
    """One replica's life, in which every expert saw so many tokens."""
    assert spec.moe is not None
    recorder = ExpertLoadRecorder(model, ExpertLoadCounter(spec, spec.moe, Mesh(expert_parallel=True), None), path)
    recorder.on_timings([timings(0, [[tokens] * 8] * len(spec.moe.sparse_layers))])
    recorder.close()


def test_a_replica_that_is_started_again_adds_to_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "loads.json"
    record(path, 3)
    record(path, 4)
    assert read_expert_load(path, MOE).layers == [[7] * 8] * 3


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        ("other", SPEC, "is of sparse, not of other; name another file, or remove this one"),
        ("sparse", ModelSpec.from_config(SMALL_MOE), "is of sparse with 3 sparse layers"),
    ],
)
def test_loads_of_another_model_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, spec: ModelSpec, message: str
) -> None:
    path = tmp_path / "loads.json"
    record(path, 3)
    record(path, 4, model, spec)
    assert read_expert_load(path, MOE).layers == [[3] * 8] * 3
    (line,) = caplog.messages
    assert message in line


def test_nothing_is_written_where_nothing_was_seen(tmp_path: Path) -> None:
    recorder = ExpertLoadRecorder(
        "sparse", ExpertLoadCounter(SPEC, MOE, Mesh(expert_parallel=True), None), tmp_path / "loads.json"
    )
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_the_file_follows_the_load_while_the_replica_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_load_recorder, "WRITE_EVERY_S", 0.001)
    path = tmp_path / "loads.json"
    recorder = ExpertLoadRecorder("sparse", ExpertLoadCounter(SPEC, MOE, Mesh(expert_parallel=True), None), path)
    total = 0
    while total < 3 or not path.exists():  # ends when the recorder's thread has written by itself
        recorder.on_timings([timings(0, [[1] * 8] * 3)])
        total += 1
    recorder.close()
    assert read_expert_load(path, MOE).layers == [[total] * 8] * 3


def test_a_path_that_cannot_be_written_warns_once_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(expert_load_recorder, "WRITE_EVERY_S", 0.001)
    tried = threading.Semaphore(0)

    def fail(path: Path, load: ExpertLoad) -> None:
        tried.release()
        raise OSError(28, "No space left on device")

    path = tmp_path / "loads.json"
    with monkeypatch.context() as patch:
        patch.setattr(expert_load_recorder, "write_expert_load", fail)
        counter = ExpertLoadCounter(SPEC, MOE, Mesh(expert_parallel=True), None)
        recorder = ExpertLoadRecorder("sparse", counter, path)
        recorder.on_timings([timings(0, [[5] * 8] * 3)])
        for _ in range(3):
            assert tried.acquire(timeout=10)
    recorder.close()
    (line,) = caplog.messages
    assert "cannot be written: No space left on device" in line
    assert read_expert_load(path, MOE).layers == [[5] * 8] * 3


def test_only_a_configuration_that_asks_records(tmp_path: Path) -> None:
    limits = {"max_model_len": 8, "max_num_seqs": 1, "max_num_batched_tokens": 8, "block_size": 4, "max_waiting": 1}
    config = EngineConfig(model_name="m", placement="EP1", model_path="", dtype="float32", **limits)  # type: ignore[arg-type]
    assert make_expert_load_recorder(config, SPEC) is None
