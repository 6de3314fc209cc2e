"""The KV cache, and the capacity cliff: what too little sharding costs."""

from __future__ import annotations

from monitoring.grafana.board import MODEL, PLACEMENT, Board, Row
from monitoring.grafana.panel import BYTES, SHARE, Panel, Query, count

REPLICA = "{{model_name}} {{placement}}/{{replica}}"


def _rate(metric: str) -> str:
    return f"rate(ridgewalk_{metric}{{{PLACEMENT}}}[$__rate_interval])"


KV = Board(
    "ridgewalk-kv",
    "KV and the capacity cliff",
    "Where the KV cache is, and what it costs when there is too little of it: throttling, preemption, recomputation.",
    (
        Row(
            "Where the cache is",
            (
                Panel(
                    "KV cache used",
                    "Used blocks of all blocks, by replica. Cached blocks of ended sequences do not count: they can be "
                    "evicted.",
                    "Near 100 % with requests waiting, preemptions come next: give ranks more KV (`--memory`), pool it "
                    "(`-tp`, or `-dp` with `--enable-expert-parallel`), or lower `--max-num-seqs`.",
                    SHARE,
                    (Query(f"ridgewalk_kv_cache_usage_ratio{{{PLACEMENT}}}", REPLICA),),
                    width=8,
                    limits=(0.9, 0.98),
                    maximum=1,
                ),
                Panel(
                    "KV cache used, by attention group",
                    "The same within replicas that attend data-parallel: each group has its own cache.",
                    "One full group beside an empty one is stranded KV: look at long-running sequences and routing.",
                    SHARE,
                    (
                        Query(
                            "sum by (model_name, placement, replica, group) "
                            f'(ridgewalk_kv_blocks{{{PLACEMENT},state="used"}}) / '
                            f"sum by (model_name, placement, replica, group) (ridgewalk_kv_blocks{{{PLACEMENT}}})",
                            REPLICA + " group {{group}}",
                        ),
                    ),
                    width=8,
                    limits=(0.9, 0.98),
                    maximum=1,
                ),
                Panel(
                    "Predicted peak of KV use",
                    "The most blocks that the running sequences are expected to need at one time, with a margin, of "
                    "all blocks of their group. Predictive admission lets the next one begin when the peak with it is "
                    "at most 100 %.",
                    "Far above what is used: long answers are still to come, and requests wait for them. Over 100 %: "
                    "answers grow longer than before, and somebody may be preempted.",
                    SHARE,
                    (Query(f"ridgewalk_kv_predicted_peak_ratio{{{PLACEMENT}}}", REPLICA + " group {{group}}"),),
                    width=8,
                    limits=(1.0, 1.2),
                ),
                Panel(
                    "Blocks by state",
                    "Used, cached (evictable) and free blocks. Available = cached + free.",
                    "Free blocks that never go away are memory for a longer context, more sequences, or another model.",
                    count("blocks"),
                    (
                        Query(
                            f"sum by (model_name, state) (ridgewalk_kv_blocks{{{PLACEMENT}}})",
                            "{{model_name}} {{state}}",
                        ),
                    ),
                    stacked=True,
                ),
                Panel(
                    "Internal fragmentation",
                    "Slots of used blocks that hold no token yet.",
                    "About half a block for each sequence is normal. If it is high, sequences are short against "
                    "`--block-size`: lower that.",
                    SHARE,
                    (Query(f"ridgewalk_kv_internal_fragmentation_ratio{{{PLACEMENT}}}", REPLICA),),
                    limits=(0.25, 0.5),
                    maximum=1,
                ),
                Panel(
                    "Prefix cache hits",
                    "Prompt tokens found in the prefix cache, of those looked up.",
                    "If prompts share a beginning and this is low: put what is shared first, or give the "
                    "cache room to keep it.",
                    SHARE,
                    (
                        Query(
                            f"sum by (model_name, placement) ({_rate('prefix_cache_hits_total')}) / "
                            f"(sum by (model_name, placement) ({_rate('prefix_cache_queries_total')}) > 0)",
                            "{{model_name}} {{placement}}",
                        ),
                    ),
                    maximum=1,
                ),
            ),
        ),
        Row(
            "The capacity cliff",
            (
                Panel(
                    "Throttled for want of KV",
                    "Share of the time in which work waited for KV blocks alone.",
                    "This is the edge. Give more KV, raise `-tp`, or add replicas before preemptions start.",
                    SHARE,
                    (Query(_rate("kv_throttled_seconds_total"), REPLICA),),
                    limits=(0.05, 0.5),
                    maximum=1,
                ),
                Panel(
                    "Preemptions",
                    "Sequences that lost their KV blocks to another and will be computed again.",
                    "Lower `--max-num-seqs` until they stop, then give more KV.",
                    count("preemptions/s"),
                    (Query(_rate("num_preemptions_total"), REPLICA),),
                    limits=(0.1, 1),
                ),
                Panel(
                    "Preemptions per ended sequence",
                    "Over the last five minutes. Above 0.5 the alert `PreemptionStorm` fires.",
                    "Sequences are admitted that cannot all finish: lower `--max-num-seqs`.",
                    count("preemptions"),
                    (
                        Query(
                            f"ridgewalk:preemptions_per_sequence:ratio_rate5m{{{PLACEMENT}}}",
                            "{{model_name}} {{placement}}",
                        ),
                    ),
                    limits=(0.1, 0.5),
                ),
                Panel(
                    "Recompute tax",
                    "Of all tokens computed over the last minute, those computed a second time after a preemption.",
                    "The price of preemption. Lower `--max-num-seqs`, give more KV, or keep on the host what preempted "
                    "sequences had (`--swap-space`; if there is some already, more).",
                    SHARE,
                    (Query(f"ridgewalk:recompute_tax:ratio_rate1m{{{PLACEMENT}}}", "{{model_name}} {{placement}}"),),
                    limits=(0.01, 0.05),
                ),
                Panel(
                    "KV blocks swapped",
                    "Blocks of preempted sequences copied to the host when others needed their place, and copied back "
                    "when the sequences returned. Nothing without swap space (`--swap-space`).",
                    "Much more out than in: the space is full (raise `--swap-space`), or sequences return to another "
                    "attention group, or are aborted while they wait.",
                    count("blocks/s"),
                    (
                        Query(_rate("kv_blocks_swapped_out_total"), REPLICA + " out"),
                        Query(_rate("kv_blocks_swapped_in_total"), REPLICA + " in"),
                    ),
                ),
                Panel(
                    "Swap space used",
                    "Blocks on the host with what preempted sequences had that wait. Absent without swap space.",
                    "At 100 % what was copied first is given up and will be recomputed: raise `--swap-space`.",
                    SHARE,
                    (Query(f"ridgewalk_kv_swap_usage_ratio{{{PLACEMENT}}}", REPLICA),),
                    limits=(0.8, 0.95),
                    maximum=1,
                ),
                Panel(
                    "Capacity trap",
                    "1 while a replica is throttled and computes less than half of what it did unthrottled. Absent "
                    "while that is unknown.",
                    "Compute idles for want of KV: compare the replicated weights below with the cache, and move to a "
                    "placement that repeats less.",
                    "none",
                    (Query(f"ridgewalk_capacity_trap{{{MODEL}}}", "{{model_name}}"),),
                    limits=(0.5, 1),
                    maximum=1,
                ),
                Panel(
                    "Running and waiting",
                    "Sequences that hold KV, and those that wait for a place.",
                    "Waiting that grows while running falls is the cliff; both growing is only load.",
                    count("sequences"),
                    (
                        Query(f"ridgewalk_num_requests_running{{{PLACEMENT}}}", REPLICA + " running"),
                        Query(f"ridgewalk_num_requests_waiting{{{PLACEMENT}}}", REPLICA + " waiting"),
                    ),
                ),
            ),
        ),
        Row(
            "What data parallelism gives away",
            (
                Panel(
                    "Stranded KV",
                    "Blocks that are available where the waiting requests are not, of all blocks of the model.",
                    "Fewer, larger replicas (higher `-tp`) pool the cache.",
                    SHARE,
                    (Query(f"ridgewalk_kv_stranded_ratio{{{MODEL}}}", "{{model_name}}"),),
                    width=12,
                    limits=(0.1, 0.2),
                    maximum=1,
                ),
                Panel(
                    "Replicated weights",
                    "Bytes of weights that are held more than once: KV capacity given away.",
                    "When KV is scarce: tensor or expert parallelism holds them once. When it is not, copies cost "
                    "nothing and wait for nobody.",
                    BYTES,
                    (Query(f"ridgewalk_kv_weight_replication_bytes{{{MODEL}}}", "{{model_name}}"),),
                    width=12,
                ),
            ),
        ),
    ),
)
