"""Every flag of `serve` is named as the user typed it when its value cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from ridgewalk.cli import app
from ridgewalk.config import ConfigError
from ridgewalk.flags import in_flags

FLAGS = {
    "model": "MODEL",
    "memory": "--memory",
    "num_blocks": "--num-blocks",
    "api_keys": "--api-key",
    "replicas": "--replicas",
}


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("models[0].placements[0].memory: too small", "--memory: too small"),
        ("wrong. models[0].placements[0]: memory and num_blocks exclude each other",
         "wrong. --memory and --num-blocks exclude each other"),
        ("wrong. api_keys[1]: a key is blank", "wrong. --api-key: a key is blank"),
        ("num_blocks 5 needs more memory; lower --num-blocks", "--num-blocks 5 needs more memory; lower --num-blocks"),
        ("/tmp/num_blocks/num_blocks.json cannot be read", "/tmp/num_blocks/num_blocks.json cannot be read"),
        ("models[1].placements[0].memory: of a file", "models[1].placements[0].memory: of a file"),
        ("raise its replicas: there are two", "raise its replicas: there are two"),
    ],
)  # fmt: skip
def test_fields_are_shown_as_flags(sentence: str, shown: str) -> None:
    assert in_flags(sentence, FLAGS) == shown


WRONG = {
    "--workload": "poetry",
    "--hardware": "8xh300",
    "--tensor-parallel-size": "0",
    "--pipeline-parallel-size": "0",
    "--data-parallel-size": "0",
    "--replicas": "0",
    "--num-redundant-experts": "2",
    "--expert-load": "load.json",
    "--record-expert-load": "load.json",
    "--memory": "much",
    "--num-blocks": "0",
    "--gpus-per-rank": "-1",
    "--threads-per-rank": "0",
    "--cpus": "99999",
    "--peak-flops-per-rank": "0",
    "--peak-bandwidth-per-rank": "fast",
    "--dtype": "int3",
    "--max-model-len": "1",
    "--max-num-seqs": "0",
    "--max-num-batched-tokens": "0",
    "--block-size": "0",
    "--admission": "hopeful",
    "--routing": "nearest",
    "--swap-space": "much",
    "--slo-ttft-ms": "0",
    "--slo-tpot-ms": "-1",
    "--max-waiting": "0",
    "--port": "0",
    "--ingress-replicas": "0",
    "--api-key": " ",
    "--api-key-file": "/no/such/file",
    "--app-name": "",
    "--host": "203.0.113.7",
}
FREE = {
    "--served-model-name", "--config", "-c", "--enable-expert-parallel", "--enable-prefix-caching", "--with-prometheus",
}  # never wrong  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), WRONG.items())
def test_a_wrong_value_names_its_flag(flag: str, value: str) -> None:
    result = CliRunner().invoke(app, ["serve", "demo-dense", flag, value])
    assert isinstance(result.exception, ConfigError)
    assert flag in str(result.exception)
    assert re.search(rf"(?<![\w-]){flag[2:].replace('-', '_')}:", str(result.exception)) is None


def test_no_flag_was_forgotten() -> None:
    known = {*WRONG, *FREE}
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert all(known & set(p.opts) for p in commands["serve"].params if p.param_type_name == "option")


def test_beside_a_file_only_flags_that_were_given_are_named(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("{models: [{model: demo-dense, block_size: 0}]}")
    result = CliRunner().invoke(app, ["serve", "-c", str(file), "--port", "0"])
    assert "--port: " in str(result.exception)
    assert "models[0].block_size: " in str(result.exception)
