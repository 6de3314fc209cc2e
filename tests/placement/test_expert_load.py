"""The file of observed expert loads."""

from __future__ import annotations

import json

import pytest

from ridgewalk.placement.expert_load import ExpertLoad, ExpertLoadError, read_expert_load, write_expert_load
from ridgewalk.placement.moe_spec import MoESpec

MOE = MoESpec(num_experts=3, top_k=1, intermediate_size=8, sparse_layers=(1, 2))
LOAD = ExpertLoad("demo", 3, [[5, 0, 2], [1, 3, 3]])


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "load.json"
    write_expert_load(path, ExpertLoad("demo", 3, [[0, 0, 0], [0, 0, 0]]))
    write_expert_load(path, LOAD)
    assert read_expert_load(path, MOE) == LOAD
    assert json.loads(path.read_text()) == {"model": "demo", "num_experts": 3, "layers": [[5, 0, 2], [1, 3, 3]]}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "load.json is no file of expert loads"),
        ('{"model": "m", "num_experts": 3, "layers": [["x"]]}', r"Expected `int`, got `str` - at `\$.layers"),
        ('{"model": "m", "layers": []}', "missing required field `num_experts`"),
        ('{"model": "m", "num_experts": 3, "layers": [[1, 1, 1]]}', "of m with 1 sparse layers of 3 experts, but this"),
        ('{"model": "m", "num_experts": 3, "layers": [[1, 1], [1, 1, 1]]}', "but this model has 2 of 3; record it"),
        ('{"model": "m", "num_experts": 3, "layers": [[1, 1, -1], [1, 1, 1]]}', "negative"),
    ],
)
def test_file_that_cannot_be_used_is_named(tmp_path, content, message):
    path = tmp_path / "load.json"
    path.write_text(content)
    with pytest.raises(ExpertLoadError, match=message):
        read_expert_load(path, MOE)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ExpertLoadError, match=r"expert_load: .*nothing.json cannot be read: No such file"):
        read_expert_load(tmp_path / "nothing.json", MOE)
