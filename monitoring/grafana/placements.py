"""Which placements there are, what each gets, and why."""

from __future__ import annotations

from monitoring.grafana.board import MODEL, PLACEMENT, Board, Row
from monitoring.grafana.panel import SECONDS, SHARE, Panel, Query, count

REPLICA = "{{model_name}} {{placement}}/{{replica}}"
SHAPE = "{{model_name}} {{placement}}"


def _rate(metric: str) -> str:
    return f"rate(ridgewalk_{metric}{{{PLACEMENT}}}[$__rate_interval])"


def _share_of_model(expr: str) -> str:
    of_model = f"(sum by (model_name) ({expr}) > 0)"
    return f"sum by (model_name, placement) ({expr}) / ignoring (placement) group_left () {of_model}"


PLACEMENTS = Board(
    "ridgewalk-placements",
    "Placements and routing",
    "The placements of each model side by side: what the router sends them, and how they bear it.",
    (
        Row(
            "Placements",
            (
                Panel(
                    "Replicas that answer",
                    "The mesh of every replica that answered the last scrape.",
                    "A replica that is not here starts, died, or hangs: read its log.",
                    "none",
                    (Query(f"ridgewalk_placement_info{{{PLACEMENT}}}", ""),),
                    kind="table",
                    width=12,
                ),
                Panel(
                    "Replicas",
                    "Replicas that answered, by placement.",
                    "A step down that does not come back: Serve cannot place the replica again (`serve status`).",
                    count("replicas"),
                    (Query(f"count by (model_name, placement) (ridgewalk_placement_info{{{PLACEMENT}}})", SHAPE),),
                    width=6,
                ),
                Panel(
                    "Missing replicas",
                    "Replicas that shall run and did not answer.",
                    "They start, stop, or hang. Streams continue on the others meanwhile; watch their KV cache.",
                    count("replicas"),
                    (Query(f"ridgewalk_scrape_missing_replicas{{{PLACEMENT}}}", SHAPE),),
                    width=6,
                    limits=(1, 2),
                ),
            ),
        ),
        Row(
            "Routing",
            (
                Panel(
                    "Decisions, by reason",
                    "Why the router chose as it did.",
                    "*pooled_kv*: the long found big groups; *fewer_ranks*: the short kept out of their way. "
                    "*latency_slo*: the pace that requests ask for decided. "
                    "*kv_cliff* or *all_full* grow: KV runs out, add replicas. *least_loaded*: it has yet to learn.",
                    "reqps",
                    (
                        Query(
                            f"sum by (model_name, reason) ({_rate('routing_decisions_total')})",
                            "{{model_name}} {{reason}}",
                        ),
                    ),
                ),
                Panel(
                    "Decisions, by placement",
                    "Share of a model's requests that each placement gets.",
                    "It should follow what each can bear; if one starves, see whether it answers at all.",
                    SHARE,
                    (Query(_share_of_model(_rate("routing_decisions_total")), SHAPE),),
                    maximum=1,
                ),
                Panel(
                    "Tokens, by placement",
                    "Share of a model's generated tokens that each placement computes.",
                    "Less than its share of requests: it gets the short ones, or it is slow (see *Time in the queue*).",
                    SHARE,
                    (Query(_share_of_model(_rate("generation_tokens_total")), SHAPE),),
                    maximum=1,
                ),
            ),
        ),
        Row(
            "Replicas side by side",
            (
                Panel(
                    "Tokens, by replica",
                    "Tokens sampled.",
                    "Replicas of one placement should be alike. One that lags has a slow rank: see *Synchronization*.",
                    count("tokens/s"),
                    (Query(_rate("generation_tokens_total"), REPLICA),),
                ),
                Panel(
                    "Batch",
                    "Tokens sampled in a step: how many sequences share the reading of the weights.",
                    "A small batch wastes bandwidth: fewer replicas, or more load.",
                    count("tokens/step"),
                    (Query(f"{_rate('generation_tokens_total')} / ({_rate('engine_steps_total')} > 0)", REPLICA),),
                ),
                Panel(
                    "Time in the queue, p90",
                    "From a sequence's arrival at its replica to its first schedule.",
                    "One placement far above the others: it gets more than it can bear, or lengths it is not made for.",
                    SECONDS,
                    (
                        Query(
                            "histogram_quantile(0.9, sum by (model_name, placement, replica, le) "
                            f"({_rate('request_queue_time_seconds_bucket')}))",
                            REPLICA,
                        ),
                    ),
                    limits=(0.5, 5),
                ),
                Panel(
                    "Running, by replica",
                    "Sequences that hold KV blocks.",
                    "Uneven over equal replicas: long sequences gather on one of them.",
                    count("sequences"),
                    (Query(f"ridgewalk_num_requests_running{{{PLACEMENT}}}", REPLICA),),
                ),
                Panel(
                    "Waiting, by replica",
                    "Sequences not admitted yet.",
                    "Some wait here while others there are idle: stranded KV, see *KV and the capacity cliff*.",
                    count("sequences"),
                    (Query(f"ridgewalk_num_requests_waiting{{{PLACEMENT}}}", REPLICA),),
                ),
                Panel(
                    "Spread of KV use",
                    "Fullest replica less the emptiest, of each model.",
                    "A lasting spread with waiting requests: fewer, larger replicas.",
                    SHARE,
                    (
                        Query(
                            f"max by (model_name) (ridgewalk_kv_cache_usage_ratio{{{PLACEMENT}}}) - "
                            f"min by (model_name) (ridgewalk_kv_cache_usage_ratio{{{PLACEMENT}}})",
                            "{{model_name}}",
                        ),
                    ),
                    limits=(0.3, 0.6),
                    maximum=1,
                ),
            ),
        ),
        Row(
            "What it costs",
            (
                Panel(
                    "Version",
                    "The version of the ingress that answers.",
                    "Two versions in turn: an upgrade is under way, or got stuck.",
                    "none",
                    (Query("ridgewalk_build_info", "{{version}}"),),
                    kind="table",
                    width=12,
                ),
                Panel(
                    "Weights held twice",
                    "Bytes that the placements of a model repeat.",
                    "What a hybrid placement costs; worth it while both get traffic (*Decisions, by placement*).",
                    "bytes",
                    (Query(f"ridgewalk_kv_weight_replication_bytes{{{MODEL}}}", "{{model_name}}"),),
                    width=12,
                ),
            ),
        ),
    ),
)
