"""What is asked: the stated quantiles, the same for the same seed, and what cannot be asked is said at once."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ridgewalk.bench.lengths import LogNormalLengths
from ridgewalk.bench.options import check_enough, choose_work, parse_loads, parse_slo
from ridgewalk.bench.profiles import PROFILES
from ridgewalk.bench.prompts import count_tokens, write_prompts
from ridgewalk.bench.trace_file import read_trace
from ridgewalk.bench.workload import RequestShape, check_context, sample_requests, scaled
from ridgewalk.config import ConfigError
from ridgewalk.zoo import zoo_path


@given(seed=st.integers(0, 2**32), count=st.integers(20, 400))
def test_reasoning_lengths_have_the_published_quantiles(seed: int, count: int) -> None:
    requests = sample_requests(PROFILES["reasoning"], count, seed)
    within = sum(50 <= request.input_length <= 150 for request in requests) / count
    above = sum(request.output_length > 5_000 for request in requests) / count
    assert within == pytest.approx(0.77, abs=0.01 + 3 / count)  # 150.4 tokens are 150
    assert above == pytest.approx(0.45, abs=2 / count)
    assert max(request.output_length for request in requests) <= 8_000


@given(median=st.floats(1, 1e5), sigma=st.floats(0.01, 3), seed=st.integers(0, 2**32), count=st.integers(1, 300))
def test_the_lengths_of_a_sample_are_evenly_spaced_quantiles(
    median: float, sigma: float, seed: int, count: int
) -> None:
    lengths = LogNormalLengths(median, sigma, longest=50_000)
    sample = sorted(lengths.sample(count, random.Random(seed)))
    assert sample == [max(1, round(lengths.quantile((index + 0.5) / count))) for index in range(count)]


@given(length=st.floats(100, 40_000))
def test_share_above_is_the_inverse_of_the_quantile(length: float) -> None:
    lengths = LogNormalLengths(4_465.0, 0.9, longest=50_000)
    share = lengths.share_above(length)
    assert lengths.quantile(1 - share) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_the_same_seed_asks_the_same_and_another_something_else(profile) -> None:  # type: ignore[no-untyped-def]
    assert sample_requests(profile, 50, 7) == sample_requests(profile, 50, 7)
    assert sample_requests(profile, 50, 7) != sample_requests(profile, 50, 8)


def test_scaling_leaves_at_least_one_token_and_all_times() -> None:
    assert scaled([RequestShape(100, 10, 5.0), RequestShape(3, 3)], 0.05) == (
        RequestShape(5, 1, 5.0),
        RequestShape(1, 1),
    )


def test_a_request_over_the_context_names_a_scale_that_fits() -> None:
    requests = scaled(sample_requests(PROFILES["reasoning"], 100, 0), 0.5)
    with pytest.raises(ConfigError, match=r"--scale: request \d+ needs .* holds 2,048; try --scale 0\.") as caught:
        check_context(requests, 2_048, 0.5)
    fits = float(str(caught.value).rsplit(" ", 1)[-1])
    check_context(scaled(sample_requests(PROFILES["reasoning"], 100, 0), fits), 2_048, fits)
    check_context(requests, None, 0.5)


def test_prompts_have_the_tokens_asked_for_and_share_no_prefix() -> None:
    tokenizer = Tokenizer.from_file(str(zoo_path("demo-dense") / "tokenizer.json"))
    lengths = [1, 2, 3, 5, 17, 64, 300]
    prompts = write_prompts(tokenizer, lengths * 3, seed=1)
    assert [count_tokens(tokenizer, prompt) for prompt in prompts] == lengths * 3
    assert prompts == write_prompts(tokenizer, lengths * 3, seed=1)
    longer = write_prompts(tokenizer, [length + 1 for length in lengths], seed=1)
    assert all(a[:8] != b[:8] for a, b in zip(prompts[4:7], longer[4:], strict=True))
    long = [prompt for prompt, length in zip(prompts, lengths * 3, strict=True) if length >= 17]
    assert len({prompt[:16] for prompt in long}) == len(long)


def test_a_trace_is_read_with_fields_of_others_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 0, "input_length": 655, "output_length": 52, "hash_ids": [0, 1]}]
    lines.append({"timestamp": 105, "input_length": 180, "output_length": 26})
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_trace(path) == (RequestShape(655, 52, 0.0), RequestShape(180, 26, 105.0))
    assert read_trace(path, limit=1) == (RequestShape(655, 52, 0.0),)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2"),
        ('{"input_length": 5}', "line 2: .*output_length"),
        ('{"input_length": 0, "output_length": 1}', "line 2: .*input_length"),
        ('{"input_length": 5, "output_length": 1, "timestamp": 3}', "line 2: give every line a timestamp, or none"),
    ],
)
def test_a_broken_line_of_a_trace_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_length": 5, "output_length": 1}\n' + line)
    with pytest.raises(ConfigError, match=problem):
        read_trace(path)


def test_a_trace_that_is_missing_or_empty_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="has no requests"):
        read_trace(tmp_path / "empty.jsonl")


def test_loads_are_swept_in_rising_order() -> None:
    assert [load.concurrency for load in parse_loads("16,4, 64,4", None, False)] == [4, 16, 64]
    assert parse_loads(None, 2.0, False)[0].label == "2 requests/s"
    assert parse_loads(None, None, True)[0].label == "as in the trace"


@pytest.mark.parametrize(
    ("concurrency", "rate", "problem"),
    [("4", 1.0, "--rate: give either"), (None, None, "--concurrency: say"), ("0", None, "--concurrency: '0'"),
     ("4,", None, "--concurrency: '4,'"), (None, -1.0, "--rate: -1"), (None, float("nan"), "--rate: nan")],
)  # fmt: skip
def test_a_load_that_is_none_is_refused(concurrency: str | None, rate: float | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_loads(concurrency, rate, False)


def test_durations_need_a_unit() -> None:
    slo = parse_slo("500ms", "0.05s", "60s")
    assert (slo.ttft_ms, slo.itl_ms, slo.e2e_s) == (500.0, 50.0, 60.0)
    with pytest.raises(ConfigError, match="--slo-itl: '50' is not a duration; write it with its unit"):
        parse_slo(None, "50", None)


def test_work_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for arguments, problem in (
        (("poetry", None, 5, 1.0), "--profile: there is no profile 'poetry'; there are chat, long-prompt, reasoning"),
        (("chat", tmp_path, 5, 1.0), "--trace: give either"),
        (("chat", None, 0, 1.0), "--requests: 0"),
        (("chat", None, 5, 0.0), "--scale: 0"),
    ):
        with pytest.raises(ConfigError, match=problem):
            choose_work(*arguments, seed=0, force_lengths=True)  # type: ignore[arg-type]
    work = choose_work("chat", None, 5, 0.1, 0, True)
    with pytest.raises(ConfigError, match="--requests: 5 requests never keep 64 in flight"):
        check_enough(work, parse_loads("4,64", None, False))
