"""`ridgewalk plan` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ridgewalk.calibration.hardware_file import as_yaml
from ridgewalk.cli import app
from ridgewalk.config import ConfigError, load_config
from ridgewalk.machine import calibration_path
from ridgewalk.routing.latency_slo import LatencySlo
from tests.calibration.test_hardware_file import machine

SMALL = ("--workload", "chat", "--requests", "24")


def invoke(*arguments: str) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(app, ["plan", *arguments])
    return done.stdout, done.exception


def planned(*arguments: str) -> list[dict[str, object]]:
    stdout, exception = invoke(*arguments, *SMALL, "--json")
    assert exception is None, exception
    listed = json.loads(stdout)
    assert isinstance(listed, list)
    return listed


def test_json_lists_every_placement_best_first_with_its_figures_and_the_reason() -> None:
    listed = planned("--model", "qwen2.5-32b", "--hardware", "4xh200")
    names = [item["name"] for item in listed]
    assert set(names) == {"TP4", "PP2xTP2", "PP4", "DP2xTP2", "DP2xPP2", "DP4", "DP2+TP2"}
    rates = [item["throughput_tokens_per_s"] for item in listed]
    assert rates == sorted(rates, reverse=True)
    for item in listed:
        assert set(item) == {
            "name", "shapes", "feasible", "reason", "makespan_s", "throughput_tokens_per_s", "ttft_p50_s", "tpot_p50_s",
            "kv_capacity_tokens", "preemptions", "recomputed_tokens",
        }  # fmt: skip
        assert item["feasible"]
        assert item["reason"]
    mixed = listed[names.index("DP2+TP2")]
    assert mixed["shapes"] == [
        {"replicas": 2, "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1,
         "enable_expert_parallel": False},
        {"replicas": 1, "tensor_parallel_size": 2, "pipeline_parallel_size": 1, "data_parallel_size": 1,
         "enable_expert_parallel": False},
    ]  # fmt: skip


def test_what_cannot_be_loaded_is_last_with_the_reason_and_without_figures() -> None:
    listed = planned("--model", "llama-3.1-70b", "--hardware", "8xh200", "--only", "DP8,TP3,TP8,TP16")
    assert [item["name"] for item in listed] == ["TP8", "DP8", "TP3", "TP16"]
    assert [item["feasible"] for item in listed] == [True, False, False, False]
    whole, three, many = listed[1:]
    assert "needs 131.4" in str(whole["reason"])
    assert "does not divide the 64 attention heads" in str(three["reason"])
    assert "16 devices, and there are 8" in str(many["reason"])
    assert whole["makespan_s"] is whole["kv_capacity_tokens"] is whole["preemptions"] is None


def test_tensor_parallel_groups_are_not_split_over_nodes() -> None:
    listed = planned("--model", "llama-3.1-8b", "--hardware", "2x6xh200", "--only", "DP3xTP4,DP2xTP4,TP8,DP4+TP4")
    problems = {item["name"]: str(item["reason"]) for item in listed if not item["feasible"]}
    assert set(problems) == {"DP3xTP4", "TP8"}
    assert "groups of 4 do not all fit into 2 nodes of 6" in problems["DP3xTP4"]


def test_the_configuration_that_is_emitted_can_be_served(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    only = ("--only", "DP2xEP2+TP2", "--emit", str(path))
    planned("--model", "mixtral-8x7b", "--hardware", "4xh200", *only)
    (model,) = load_config(path).models
    assert model.model == "mistralai/Mixtral-8x7B-Instruct-v0.1"
    assert [placement.name for placement in model.placements] == ["DP2xEP2", "TP2"]
    assert [placement.gpus_per_rank for placement in model.placements] == [1.0, 1.0]
    assert (model.admission, model.routing) == ("prompt_only", "least_loaded")  # of the policy that was simulated


def test_limits_that_were_planned_for_are_emitted_as_the_pace_that_requests_ask_for(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    goodput = ("--objective", "goodput", "--tpot", "40ms", "--policy", "ridgewalk", "--emit", str(path))
    planned("--model", "r1-distill-qwen-1.5b", "--hardware", "2xh100", "--only", "DP2,TP2", *goodput)
    (model,) = load_config(path).models
    assert model.slo == LatencySlo(tpot_s=0.04)
    assert (model.admission, model.routing) == ("predictive", "kv_growth")


def test_a_table_reasons_and_an_account_are_printed_and_a_plot_drawn(tmp_path: Path) -> None:
    plot = tmp_path / "plan.svg"
    stdout, exception = invoke(
        "--model", "r1-distill-qwen-1.5b", "--hardware", "2xh100", "--requests", "8", "--rate", "4",
        "--workload", "chat", "--explain", "TP2", "--plot", str(plot),
    )  # fmt: skip
    assert exception is None, exception
    assert "TP2: where its" in stdout
    assert "of the best's throughput" in stdout
    assert "DP2" in plot.read_text()


def test_this_machine_is_planned_for_with_fewer_ranks_too_and_what_is_emitted_runs_on_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDGEWALK_CACHE", str(tmp_path))
    calibration_path().write_text(as_yaml(machine(), "Measured by a test."))
    path = tmp_path / "service.yaml"
    listed = planned("--model", "demo-dense", "--hardware", "this-machine", "--emit", str(path))
    assert {item["name"] for item in listed} == {"TP1", "TP2", "DP2", "PP2"}
    (model,) = load_config(path).models
    assert [placement.gpus_per_rank for placement in model.placements] == [0.0]
    sparse = planned("--model", "demo-moe", "--hardware", "this-machine")
    assert "DP2xEP2" in {item["name"] for item in sparse}
    assert all(item["feasible"] for item in (*listed, *sparse))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "llama-9"), "--model: there is no model 'llama-9'; there are .*llama-3.1-8b"),
        (("--hardware", "8xb200"), "--hardware: there is no hardware '8xb200'.*h100, h200"),
        (("--hardware", "this-machine"), "--hardware: this-machine has not been measured; run `ridgewalk calibrate`"),
        (("--workload", "http://127.0.0.1:9"), "--workload: no service answers at http://127.0.0.1:9"),
        (("--workload", "poetry"), "--workload: there is no workload 'poetry'; there are chat, long-prompt, reasoning"),
        (("--workload", "none.yaml"), "--workload: none.yaml cannot be read"),
        (("--requests", "0"), "--requests: 0 is not a number of requests over 0"),
        (("--rate", "-1"), "--rate: -1 is not"),
        (("--policy", "greedy"), "--policy: there is no policy 'greedy'; there are vllm, ridgewalk"),
        (("--objective", "speed"), "--objective: there is no objective 'speed'; there are throughput and goodput"),
        (("--objective", "goodput"), "--objective: goodput needs a limit; add --ttft"),
        (("--ttft", "2s"), "--ttft: a limit counts with --objective goodput only"),
        (("--objective", "goodput", "--tpot", "50"), "--tpot: '50' is not a duration"),
        (("--only", "TP8,XP2"), "--only: 'XP2' is no placement; write it as TP8"),
        (("--only", "DP2xEP4"), "--only: 'DP2xEP4': experts are spread over dp x tp = 2 ranks, so it is EP2"),
        (("--explain", "all"), "--explain: 'ALL'|--explain: 'all' is no placement"),
        (("--plot", "plan.txt"), "--plot: plan.txt should end in one of .png, .svg, .pdf"),
        (("--workload", "long-prompt", "--requests", "2000"), "--workload: long-prompt has requests of up to"),
        (
            ("--model", "llama-3.1-405b", "--hardware", "h200"),
            "--hardware: no placement of llama-3.1-405b fits on h200",
        ),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_flag_and_what_there_is(
    arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDGEWALK_CACHE", str(tmp_path))
    defaults = {"--model": "qwen2.5-14b", "--hardware": "2xh200", "--requests": "8"}
    given = [item for flag, value in defaults.items() if flag not in arguments for item in (flag, value)]
    _, exception = invoke(*given, *arguments)
    assert isinstance(exception, ConfigError), exception
    with pytest.raises(ConfigError, match=says):
        raise exception
