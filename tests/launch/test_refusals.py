"""`ridgewalk serve` where it cannot work: one sentence, before anything starts."""

from __future__ import annotations

import os
import subprocess

import pytest

from ridgewalk.replica.host import free_port
from tests.monitoring.live_service import RIDGEWALK

MODEL = "demo-dense"
COMMAND = [*RIDGEWALK, "serve"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "neither a model of the zoo"),
        ([], "name either a MODEL or a configuration file"),
        ([MODEL, "-pp", "200"], "--pipeline-parallel-size"),
        ([MODEL, "-dp", "2", "--enable-expert-parallel"], "is dense"),
        ([MODEL, "--num-redundant-experts", "2"], "--num-redundant-experts needs --enable-expert-parallel"),
        ([MODEL, "-tp", "3"], "--tensor-parallel-size"),
        ([MODEL, "--memory", "1MiB"], "raise --memory"),
        ([MODEL, "--max-model-len", "10000000"], "--max-model-len"),
        ([MODEL, "--num-blocks", "2"], "--num-blocks"),
        ([MODEL, "--port", "1", "--host", "203.0.113.1"], "choose another with --port"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_anything_starts(arguments: list[str], message: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "starting Ray" not in done.stdout


@pytest.mark.parametrize(
    ("address", "problem"), [("127.0.0.1:{port}", "Connection refused"), ("ray://127.0.0.1:{port}", "of Ray Client")]
)
def test_a_cluster_that_is_not_there_is_one_sentence(address: str, problem: str) -> None:
    done = subprocess.run(
        [*COMMAND, MODEL],
        env=os.environ | {"RAY_ADDRESS": address.format(port=free_port("127.0.0.1"))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
