"""Small replicas and their reports, with every number chosen by the test."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families

from ridgewalk.engine.stats import EngineStats, GroupStats
from ridgewalk.engine.step import CollectiveTiming, RankTimings
from ridgewalk.metrics.engine_metrics import EngineMetrics
from ridgewalk.metrics.exposition import merge
from ridgewalk.metrics.snapshot import decode
from ridgewalk.metrics.utilization import HardwarePeaks
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_stats(groups: list[GroupStats] | None = None, **fields: float) -> EngineStats:
    """An idle replica of 100 blocks of 16 tokens unless ``fields`` say otherwise."""
    idle: dict[str, float] = dict.fromkeys(
        ("num_waiting", "num_preemptions", "recomputed_tokens", "prefix_cache_queries", "prefix_cache_hits",
         "prompt_tokens", "generation_tokens", "steps"), 0,
    )  # fmt: skip
    idle |= {"block_size": 16, "throttled_seconds": 0.0} | fields
    return EngineStats(groups=groups or [GroupStats(0, 0, 100, 0, 0)], **idle)  # type: ignore[arg-type]


def make_spec(vocab_size: int = 64, tie: bool = False) -> ModelSpec:
    """Two layers, hidden size 8, 4 query heads and 2 KV heads of 2."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": vocab_size, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16, "tie_word_embeddings": tie,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return ModelSpec.from_config(config)


def make_config(tp: int = 1, **fields: object) -> EngineConfig:
    """A replica of model ``m``."""
    plain: dict[str, object] = {
        "model_name": "m", "placement": f"TP{tp}", "model_path": "/m", "dtype": "float32", "tp": tp,
        "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 16, "max_waiting": 8,
    }  # fmt: skip
    return EngineConfig(**(plain | fields))  # type: ignore[arg-type]


def make_metrics(
    replica: str = "0", tp: int = 1, clock: Clock | None = None, peaks: HardwarePeaks | None = None, **fields: object
) -> EngineMetrics:
    """The recorder of one replica of the model of `make_spec`."""
    spec = make_spec()
    return EngineMetrics(make_config(tp, **fields), replica, spec, peaks or HardwarePeaks(), clock or Clock())


def make_timings(
    rank: int, *collectives: tuple[str, float], step: float = 0.01, group: str = "tp", **phases: float
) -> RankTimings:
    """What one rank measured, all in one group."""
    calls = [CollectiveTiming(op, seconds, 8, group) for op, seconds in collectives]
    return RankTimings(0, rank, step, phases, calls)


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Parsed with the reference parser: (sample name, labels) -> value. No sample may come twice."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(text: bytes, name: str, **labels: str) -> float | None:
    """The one sample of this name (prefix left out) that has these labels among its own; None when there is none."""
    wanted = set(labels.items())
    found = [each for (key, own), each in samples(text).items() if key == "ridgewalk_" + name and wanted <= own]
    assert len(found) < 2, found
    return found[0] if found else None


def scrape(*recorders: EngineMetrics, encoded: Iterable[bytes] = ()) -> bytes:
    """One scrape of these replicas, over the wire format."""
    return merge([decode(data) for data in [*(each.snapshot() for each in recorders), *encoded]])
