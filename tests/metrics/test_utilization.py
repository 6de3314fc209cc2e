"""The capacity trap as a replica sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ridgewalk.engine.stats import GroupStats
from ridgewalk.metrics.utilization import HardwarePeaks, Utilization
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from tests.metrics.builders import make_spec, make_stats


class Engine:
    """Reports every 0.1 s at a rate of tokens."""

    def __init__(self) -> None:
        self.utilization = Utilization(make_spec(), Mesh(), "float32")
        self.now, self.tokens, self.generated, self.recomputed, self.throttled_seconds = 0.0, 0, 0, 0, 0.0
        self.report(throttled=False)

    def run(
        self, seconds: float, rate: int, throttled: bool = False, recomputed_rate: int = 0, prompt_rate: int = 0
    ) -> Utilization:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            self.tokens += (rate + recomputed_rate + prompt_rate) // 10
            self.generated += rate // 10
            self.recomputed += recomputed_rate // 10
            self.throttled_seconds += 0.1 * throttled
            self.report(throttled)
        return self.utilization

    def report(self, throttled: bool) -> None:
        self.utilization.on_stats(
            make_stats(
                [GroupStats(1, 0, 99, 0, 1, throttled)], computed_tokens=self.tokens,
                generation_tokens=self.generated, recomputed_tokens=self.recomputed,
                throttled_seconds=self.throttled_seconds,
            ),
            self.now,
        )  # fmt: skip


def test_throttled_below_half_of_the_highest_is_the_trap() -> None:
    engine = Engine()
    assert engine.run(2, 1000).trapped is False
    assert engine.run(2, 600, throttled=True).trapped is False
    assert engine.run(2, 400, throttled=True).trapped is True
    assert engine.run(2, 400).trapped is False  # slow for want of work


def test_recomputed_tokens_are_not_use() -> None:
    engine = Engine()
    engine.run(2, 1000)
    assert engine.run(2, 400, throttled=True, recomputed_rate=900).trapped is True


def test_a_burst_of_prompts_sets_no_mark_for_decoding() -> None:
    """Prompts are computed at ten times the rate of decoding; then decoding goes on as fast as ever, throttled."""
    engine = Engine()
    engine.run(2, 100, prompt_rate=10_000)
    assert engine.run(2, 1000, throttled=True).trapped is None  # no window of decoding was unthrottled yet
    engine.run(2, 1000)
    engine.run(2, 100, prompt_rate=10_000)
    assert engine.run(2, 900, throttled=True).trapped is False


def test_prompts_among_throttled_decoding_change_no_verdict() -> None:
    engine = Engine()
    engine.run(2, 1000)
    assert engine.run(2, 900, throttled=True).trapped is False
    assert engine.run(2, 100, throttled=True, prompt_rate=5000).trapped is False
    assert engine.run(2, 400, throttled=True, prompt_rate=300).trapped is True
    assert engine.run(2, 100, throttled=True, prompt_rate=5000).trapped is True
    assert engine.run(2, 600, throttled=True, prompt_rate=300).trapped is False  # half of its time went into prompts


def test_a_replica_that_was_never_unthrottled_does_not_know() -> None:
    assert Engine().run(3, 100, throttled=True).trapped is None


def test_rates_are_those_of_the_last_second() -> None:
    engine = Engine()
    assert engine.run(0.5, 1000).flops_per_second is None
    engine.run(3, 1000)
    per_token = make_spec().flops_per_token(16)
    assert round((engine.run(3, 200).flops_per_second or 0) / per_token) == 200


def bytes_per_step(
    spec: ModelSpec, mesh: Mesh, tokens: int, redundant: int = 0, filled: int = 16, keeps_fp8: bool = False
) -> float:
    """Of a replica that makes 10 steps in 2 s."""
    utilization = Utilization(spec, mesh, "float32", redundant, keeps_fp8)
    utilization.on_stats(make_stats(), 0.0)
    group = GroupStats(1, 0, 99, 16 - filled, 1)
    utilization.on_stats(make_stats([group], steps=10, computed_tokens=10 * tokens), 2.0)
    return (utilization.bytes_per_second or 0.0) * 2 / 10


def sparse_spec() -> ModelSpec:
    """Two sparse layers of 4 experts of 3 * 8 * 16 parameters, of which a token chooses 1."""
    config = {
        "architectures": ["MixtralForCausalLM"], "vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16, "tie_word_embeddings": False,
        "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 1,
    }  # fmt: skip
    return ModelSpec.from_config(config)


def test_a_step_reads_only_the_experts_that_its_tokens_choose() -> None:
    spec, expert = sparse_spec(), 3 * 8 * 16 * 4
    held = spec.weight_bytes_of_replica(Mesh(), "float32")
    assert bytes_per_step(spec, Mesh(), tokens=1, filled=0) == pytest.approx(held - 2 * 3 * expert)
    untouched = (3 / 4) ** 2 * 4  # experts of a layer
    assert bytes_per_step(spec, Mesh(), tokens=2, filled=0) == pytest.approx(held - 2 * untouched * expert)
    assert bytes_per_step(spec, Mesh(), tokens=1000, filled=0) == pytest.approx(held)


def test_weights_kept_in_fp8_are_read_in_it() -> None:
    spec = replace(sparse_spec(), fp8_block=(8, 8))
    expert = 3 * 8 * 16 + 4 * 3 * 2  # two blocks of each of three matrices
    held = spec.weight_bytes_of_replica(Mesh(), "float32", keeps_fp8=True)
    found = bytes_per_step(spec, Mesh(), tokens=1, filled=0, keeps_fp8=True)
    assert found == pytest.approx(held - 2 * 3 * expert)


def test_data_parallel_attention_reads_its_weights_in_every_group_and_each_expert_once() -> None:
    spec = sparse_spec()
    mesh = Mesh(dp=2, expert_parallel=True)
    held = spec.weight_bytes_of_replica(mesh, "float32", 2)
    assert bytes_per_step(spec, mesh, tokens=1000, redundant=2, filled=0) == pytest.approx(held)
    kv = 2 * 2 * 2 * 2 * 4  # keys and values, layers, heads, values of a head, bytes
    assert bytes_per_step(spec, mesh, tokens=1000, redundant=2, filled=16) == pytest.approx(held + 16 * kv)


def test_pipeline_stages_read_a_models_weights_once_between_them() -> None:
    spec = make_spec()
    one, two = (bytes_per_step(spec, Mesh(pp=pp), tokens=5) for pp in (1, 2))
    assert one == pytest.approx(two)
    utilization = Utilization(spec, Mesh(pp=2), "float32")
    utilization.on_stats(make_stats(), 0.0)
    utilization.on_stats(make_stats([GroupStats(1, 0, 99, 0, 1)], steps=10, computed_tokens=50), 2.0)
    assert utilization.bandwidth_utilization(HardwarePeaks(None, 1e6)) == pytest.approx(two * 10 / 2 / 2e6)
