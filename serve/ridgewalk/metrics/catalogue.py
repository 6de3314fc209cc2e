"""Every metric that Ridgewalk exports, as data: recorders, documentation and tests read it, nothing else names one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "summary"]
Source = Literal["ingress", "replica", "service"]

PREFIX = "ridgewalk_"

LABELS: Mapping[str, str] = {
    "model_name": "A served model. Empty: the request named none that is served (clients cannot invent values).",
    "placement": "Name of the placement, e.g. DP2xTP2.",
    "replica": "Ray Serve's rank of the engine replica: 0, 1, ...; a restarted replica has the rank again.",
    "ingress": "Ray Serve's rank of the ingress replica.",
    "rank": "Rank within the replica's mesh: 0 .. world_size - 1.",
    "group": "kv: attention group within the replica, 0 .. dp - 1; collective: tp | ep | pp, who took part.",
    "state": "used | cached (evictable) | free.",
    "finished_reason": "stop | length | abort | error.",
    "status": "HTTP status of the error; 499: the client left first.",
    "endpoint": "completions | chat_completions | other.",
    "reason": "Why the router chose the replica: only_replica | least_loaded | round_robin | all_full | least_delay | "
    "pooled_kv | fewer_ranks | cached_prefix | latency_slo | kv_cliff.",
    "op": "all_reduce | all_gather | gather | broadcast | dispatch | combine | send | recv.",
    "phase": "collective: wait | transfer; step: prepare, embed, attention, mlp, router, experts, collective, bubble, "
    "head, sample, other.",
    "scope": "worst: of the sparse layers | mean: over them.",
    "sampled": "true: over the measured steps only, one in 17.",
    "tensor_parallel_size": "Ranks that share each layer.",
    "pipeline_parallel_size": "Pipeline stages.",
    "data_parallel_size": "Attention groups in one replica.",
    "dtype": "Data type of weights and KV cache.",
    "device": "cpu | cuda.",
    "version": "Version of the package.",
}
"""What the values of each label are. All of them are bounded by the configuration or the code, never by traffic."""

FINISH_REASONS = ("stop", "length", "abort", "error")

LATENCY_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
                   40.0, 80.0, 160.0)  # fmt: skip
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
               1.0, 2.5)  # fmt: skip
E2E_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0)
TOKEN_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5)
COLLECTIVE_BUCKETS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)

REPLICA_LABELS = ("model_name", "placement", "replica")
"""First labels of everything that an engine replica records."""


@dataclass(frozen=True)
class MetricSpec:
    """One metric family. ``name`` is the one in the exposition, ``_total`` of counters included."""

    name: str
    kind: Kind
    source: Source  # who records it; "service": computed when the snapshots of all processes are merged
    help: str
    labels: tuple[str, ...]
    unit: str = ""
    buckets: tuple[float, ...] = ()  # upper bounds, without +Inf


def _ingress(
    name: str, kind: Kind, help_text: str, *labels: str, unit: str = "", buckets: tuple[float, ...] = ()
) -> MetricSpec:
    return MetricSpec(PREFIX + name, kind, "ingress", help_text, ("model_name", "ingress", *labels), unit, buckets)


def _replica(
    name: str, kind: Kind, help_text: str, *labels: str, unit: str = "", buckets: tuple[float, ...] = ()
) -> MetricSpec:
    return MetricSpec(PREFIX + name, kind, "replica", help_text, (*REPLICA_LABELS, *labels), unit, buckets)


def _service(name: str, help_text: str, *labels: str, unit: str = "") -> MetricSpec:
    return MetricSpec(PREFIX + name, "gauge", "service", help_text, labels, unit)


# -- what clients see: recorded by each ingress -------------------------------------------------------------------

TIME_TO_FIRST_TOKEN = _ingress(
    "time_to_first_token_seconds", "histogram", "From a request's headers to its first token.",
    unit="seconds", buckets=LATENCY_BUCKETS,
)  # fmt: skip
INTER_TOKEN_LATENCY = _ingress(
    "inter_token_latency_seconds", "histogram",
    "Between consecutive tokens of a sequence; tokens that came together share their time evenly.",
    unit="seconds", buckets=ITL_BUCKETS,
)  # fmt: skip
E2E_REQUEST_LATENCY = _ingress(
    "e2e_request_latency_seconds", "histogram", "From a request's headers to the end of each of its sequences.",
    unit="seconds", buckets=E2E_BUCKETS,
)  # fmt: skip
REQUEST_PROMPT_TOKENS = _ingress(
    "request_prompt_tokens", "histogram", "Prompt tokens of finished prompts (input sequence length).",
    unit="tokens", buckets=TOKEN_BUCKETS,
)  # fmt: skip
REQUEST_GENERATION_TOKENS = _ingress(
    "request_generation_tokens", "histogram", "Output tokens of finished sequences (output sequence length).",
    unit="tokens", buckets=TOKEN_BUCKETS,
)  # fmt: skip
REQUESTS = _ingress("requests_total", "counter", "Requests that passed all checks and went to a replica.", "endpoint")
REQUEST_SUCCESS = _ingress(
    "request_success_total", "counter", "Sequences that ended as the client asked.", "finished_reason"
)
REQUEST_ERRORS = _ingress(
    "request_errors_total", "counter", "Requests that ended in an error, also within a stream.", "status"
)
ROUTING_DECISIONS = _ingress(
    "routing_decisions_total", "counter", "Requests sent to a placement, by the router's reason.", "placement", "reason"
)
SCRAPES = MetricSpec(
    PREFIX + "scrapes_total", "counter", "ingress", "Scrapes of the whole service that this ingress answered.",
    ("ingress",),
)  # fmt: skip

# -- scheduler and KV cache: recorded by each engine replica ------------------------------------------------------

NUM_REQUESTS_RUNNING = _replica("num_requests_running", "gauge", "Sequences that hold KV blocks.", unit="sequences")
NUM_REQUESTS_WAITING = _replica(
    "num_requests_waiting", "gauge", "Sequences not admitted yet, preempted ones included.", unit="sequences"
)
REQUEST_QUEUE_TIME = _replica(
    "request_queue_time_seconds", "histogram", "From a sequence's arrival at the replica to its first schedule.",
    unit="seconds", buckets=LATENCY_BUCKETS,
)  # fmt: skip
SEQUENCES_ENDED = _replica(
    "sequences_ended_total", "counter", "Sequences that ended on the replica, aborted ones included.", "finished_reason"
)
NUM_PREEMPTIONS = _replica("num_preemptions_total", "counter", "Sequences that lost their KV blocks to another.")
RECOMPUTED_TOKENS = _replica(
    "recomputed_tokens_total", "counter", "Tokens whose KV was computed again after a preemption.", unit="tokens"
)
KV_BLOCKS_SWAPPED_OUT = _replica(
    "kv_blocks_swapped_out_total", "counter", "KV blocks of preempted sequences copied to the host.", unit="blocks"
)
KV_BLOCKS_SWAPPED_IN = _replica(
    "kv_blocks_swapped_in_total", "counter", "KV blocks copied back from the host instead of computed again.",
    unit="blocks",
)  # fmt: skip
PREFIX_CACHE_QUERIES = _replica(
    "prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.", unit="tokens"
)
PREFIX_CACHE_HITS = _replica(
    "prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.", unit="tokens"
)
PROMPT_TOKENS = _replica("prompt_tokens_total", "counter", "Prompt tokens of admitted sequences.", unit="tokens")
GENERATION_TOKENS = _replica("generation_tokens_total", "counter", "Tokens sampled.", unit="tokens")
ENGINE_STEPS = _replica("engine_steps_total", "counter", "Steps scheduled.", unit="steps")
KV_BLOCKS = _replica(
    "kv_blocks", "gauge", "KV blocks by state; available = cached + free.", "group", "state", unit="blocks"
)
KV_CACHE_USAGE = _replica("kv_cache_usage_ratio", "gauge", "Used KV blocks / all of the replica.", unit="ratio")
KV_SWAP_USAGE = _replica(
    "kv_swap_usage_ratio", "gauge", "Used blocks of the swap space / all of the replica. Absent without swap space.",
    unit="ratio",
)  # fmt: skip
KV_PREDICTED_PEAK = _replica(
    "kv_predicted_peak_ratio", "gauge",
    "Most KV blocks that the running sequences will use at one time, as predicted with a margin / all of the group. "
    "Absent without predictive admission.",
    "group", unit="ratio",
)  # fmt: skip
KV_INTERNAL_FRAGMENTATION = _replica(
    "kv_internal_fragmentation_ratio", "gauge",
    "1 - filled slots / slots over the used blocks, a shared block counted once; 0 when none is used.", unit="ratio",
)  # fmt: skip
KV_THROTTLED_SECONDS = _replica(
    "kv_throttled_seconds_total", "counter", "Time with work that waited for KV blocks alone.", unit="seconds"
)

# -- where a step's time goes: measured on the sampled steps ------------------------------------------------------

COLLECTIVE_SECONDS = _replica(
    "collective_seconds", "histogram",
    "Collectives, sends and receives of the sampled steps. transfer: the shortest duration over the ranks of one "
    "collective; wait: a rank's own duration less that. By rank, wait + transfer is its time in collectives. Waiting "
    "for a pipeline stage's input is not in it.",
    "op", "phase", "group", "rank", unit="seconds", buckets=COLLECTIVE_BUCKETS,
)  # fmt: skip
PIPELINE_BUBBLE = _replica(
    "pipeline_bubble_seconds_total", "counter",
    "Time a rank waited for the stage before it, or of the first stage for a step while others were open; over all "
    "steps, reported with the sampled ones.",
    "rank", unit="seconds",
)  # fmt: skip
ROUTED_TOKENS = _replica(
    "routed_tokens_total", "counter",
    "Token copies that dispatch sent from a rank to experts on others; over all steps, reported with the sampled ones.",
    "rank", unit="tokens",
)  # fmt: skip
ROUTED_BYTES = _replica("routed_bytes_total", "counter", "Their bytes.", "rank", unit="bytes")
EXPERT_LOAD_IMBALANCE = _replica(
    "expert_load_imbalance", "gauge",
    "Rows that the busiest rank computed for its experts / mean over the ranks of its stage, over the last 64 sampled "
    "steps together; 1 is even. Absent without expert parallelism.",
    "scope",
)  # fmt: skip
STEP_SECONDS = _replica(
    "step_seconds", "summary",
    "Step time by phase; the phases of a rank add up to its step, so shares are taken over the same steps. On one GPU "
    "other decode steps are CUDA graphs and take less.",
    "phase", "rank", "sampled", unit="seconds",
)  # fmt: skip
MODEL_FLOPS_UTILIZATION = _replica(
    "model_flops_utilization", "gauge",
    "FLOPs of useful tokens (recomputed ones excluded) in the last second / peak. Absent unless the peak is "
    "configured.",
    unit="ratio",
)  # fmt: skip
MODEL_BANDWIDTH_UTILIZATION = _replica(
    "model_bandwidth_utilization", "gauge",
    "Bytes of weights and KV cache that the steps of the last second had to read / peak; of routed experts those that "
    "even routing would have touched. Absent unless the peak is configured.",
    unit="ratio",
)  # fmt: skip

# -- facts ----------------------------------------------------------------------------------------------------------

PLACEMENT_INFO = _replica(
    "placement_info", "gauge", "The replica's mesh; always 1.",
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "dtype", "device",
)  # fmt: skip

# -- computed from the snapshots of all processes ---------------------------------------------------------------------

KV_STRANDED = _service(
    "kv_stranded_ratio",
    "Available blocks in attention groups that could admit the head-of-line waiting request of another group, which "
    "throttled or preempted for want of KV within the last 5 s / all blocks of the model.",
    "model_name", unit="ratio",
)  # fmt: skip
KV_WEIGHT_REPLICATION = _service(
    "kv_weight_replication_bytes", "Sum over weights of (copies - 1) x bytes: KV capacity given away.",
    "model_name", unit="bytes",
)  # fmt: skip
CAPACITY_TRAP = _service(
    "capacity_trap",
    "1 while a replica is throttled and its FLOPs utilization, of decoding, is under half of the highest it had "
    "unthrottled. Absent while unknown.",
    "model_name",
)  # fmt: skip
SCRAPE_MISSING_REPLICAS = _service(
    "scrape_missing_replicas", "Replicas that shall run and did not answer this scrape in time.",
    "model_name", "placement", unit="replicas",
)  # fmt: skip
SCRAPE_MISSING_INGRESSES = _service(
    "scrape_missing_ingresses", "Ingresses that did not answer this scrape in time.", unit="ingresses"
)
BUILD_INFO = _service("build_info", "The version of the ingress that answered; always 1.", "version")

CATALOGUE: tuple[MetricSpec, ...] = tuple(value for value in list(globals().values()) if isinstance(value, MetricSpec))
"""All of the above, in this order."""
