"""Where a step's time goes, and the synchronization cliff: what too much sharding costs."""

from __future__ import annotations

from monitoring.grafana.board import PLACEMENT, Board, Row
from monitoring.grafana.panel import BYTES_PER_SECOND, SECONDS, SHARE, Panel, Query, count

REPLICA = "{{model_name}} {{placement}}/{{replica}}"
RANK = REPLICA + " rank {{rank}}"


def _rate(metric: str, matchers: str = PLACEMENT) -> str:
    return f"rate(ridgewalk_{metric}{{{matchers}}}[$__rate_interval])"


def _mean(labels: str, matchers: str) -> str:
    """Mean duration of a collective, where there were any."""
    total, calls = (f"sum by ({labels}) ({_rate(f'collective_seconds_{part}', matchers)})" for part in ("sum", "count"))
    return f"{total} / ({calls} > 0)"


def _by_op(phase: str) -> Query:
    labels = "model_name, placement, op, group"
    matchers = f'{PLACEMENT},phase="{phase}",op!~"send|recv"'
    return Query(_mean(labels, matchers), "{{model_name}} {{placement}} {{op}} ({{group}})")


def _by_rank(phase: str) -> Query:
    labels = "model_name, placement, replica, op, rank"
    return Query(_mean(labels, f'{PLACEMENT},phase="{phase}"'), RANK + " {{op}}")


SYNCHRONIZATION = Board(
    "ridgewalk-synchronization",
    "Synchronization and the sync cliff",
    "Where a step's time goes: computing, moving data, or waiting for the slowest rank. One step in 17 is measured.",
    (
        Row(
            "The synchronization cliff",
            (
                Panel(
                    "Synchronization",
                    "Share of a step spent in collectives, waiting included, over the last minute.",
                    "Over a third: too much sharding for the work in a step. If KV has room, lower `-tp` and run more "
                    "replicas; else raise concurrency.",
                    SHARE,
                    (Query(f"ridgewalk:synchronization:ratio_rate1m{{{PLACEMENT}}}", REPLICA),),
                    limits=(0.2, 0.35),
                    maximum=1,
                ),
                Panel(
                    "A step, by phase",
                    "How the measured steps of the chosen placements divide, over all their ranks. Choose one "
                    "placement to see its own.",
                    "The largest share is what to work on: `collective` and `bubble` are sharding's price, `experts` "
                    "and `attention` are work, `other` and `prepare` are overhead.",
                    SHARE,
                    (
                        Query(
                            f"sum by (phase) ({_rate('step_seconds_sum')}) / scalar(sum({_rate('step_seconds_sum')}))",
                            "{{phase}}",
                        ),
                    ),
                    width=16,
                    stacked=True,
                    maximum=1,
                ),
                Panel(
                    "Step time",
                    "Mean duration of the measured steps, over ranks.",
                    "The time between tokens follows it. If it rises with the batch, work is the limit; if it does not "
                    "fall with a smaller batch, overhead or synchronization is.",
                    SECONDS,
                    (
                        Query(
                            f"sum by (model_name, placement, replica) ({_rate('step_seconds_sum')}) / "
                            "(sum by (model_name, placement, replica) "
                            "(" + _rate("step_seconds_count", PLACEMENT + ',phase="other"') + ") > 0)",
                            REPLICA,
                        ),
                    ),
                    width=12,
                ),
                Panel(
                    "Waiting for a slow rank",
                    "Share of each rank's step spent waiting for others in collectives, over the last minute.",
                    "The straggler is the rank that waits least. Look for another job on its cores or GPU, thermal "
                    "throttling, or uneven experts below.",
                    SHARE,
                    (Query(f"ridgewalk:collective_wait:ratio_rate1m{{{PLACEMENT}}}", RANK),),
                    width=12,
                    limits=(0.15, 0.3),
                ),
            ),
        ),
        Row(
            "Collectives",
            (
                Panel(
                    "Transfer, by operation",
                    "Mean time to move the data: the shortest duration over the ranks of one collective.",
                    "This is bandwidth and latency of the links. If it is most of the time, keep a tensor-parallel "
                    "group within one node, or use stages (`-pp`), which send less.",
                    SECONDS,
                    (_by_op("transfer"),),
                ),
                Panel(
                    "Wait, by operation",
                    "Mean time that ranks wait for the last one to arrive.",
                    "`dispatch` and `combine`: uneven experts. `all_reduce`: a slow rank, or ranks that share cores.",
                    SECONDS,
                    (_by_op("wait"),),
                ),
                Panel(
                    "Wait, worst of a hundred",
                    "p99 of the wait, by operation.",
                    "Far above the mean: something interrupts a rank now and then (another process, the kernel).",
                    SECONDS,
                    (
                        Query(
                            "histogram_quantile(0.99, sum by (model_name, placement, op, le) "
                            "(" + _rate("collective_seconds_bucket", PLACEMENT + ',phase="wait"') + "))",
                            "{{model_name}} {{placement}} {{op}}",
                        ),
                    ),
                ),
                Panel(
                    "Wait, by operation and rank",
                    "Who waits: the rank with the least wait is the one the others wait for.",
                    "Compare the ranks of one replica; move what slows the late one.",
                    SECONDS,
                    (_by_rank("wait"),),
                    width=12,
                ),
                Panel(
                    "Transfer, by operation and rank",
                    "The same collectives' transfer. Within one collective it is equal; ranks differ where they take "
                    "part in different ones.",
                    "One group slower than the others: its link is (another node, another socket).",
                    SECONDS,
                    (_by_rank("transfer"),),
                    width=12,
                ),
            ),
        ),
        Row(
            "Pipeline",
            (
                Panel(
                    "Bubbles",
                    "Share of the time in which a rank waited for its stage's input while other steps were under way.",
                    "Raise concurrency, so that every stage has a micro-batch; or use fewer stages.",
                    SHARE,
                    (Query(_rate("pipeline_bubble_seconds_total"), RANK),),
                    width=12,
                    limits=(0.2, 0.4),
                ),
                Panel(
                    "Sends and receives",
                    "Mean time to hand activations from stage to stage, waiting for the input not included.",
                    "It should be far below the step time. If not, the link between stages is slow.",
                    SECONDS,
                    (
                        Query(
                            _mean("model_name, placement, op, phase", f'{PLACEMENT},op=~"send|recv"'),
                            "{{model_name}} {{placement}} {{op}} {{phase}}",
                        ),
                    ),
                    width=12,
                ),
            ),
        ),
        Row(
            "Experts",
            (
                Panel(
                    "Expert imbalance",
                    "Rows that the busiest rank computed for its experts over the mean; 1 is even. The others wait.",
                    "Over 1.5: record the load (`--record-expert-load`), restart with `--expert-load` and "
                    "`--num-redundant-experts`.",
                    count("x the mean"),
                    (Query(f"ridgewalk_expert_load_imbalance{{{PLACEMENT}}}", REPLICA + " {{scope}}"),),
                    limits=(1.2, 1.5),
                ),
                Panel(
                    "Routed bytes",
                    "What dispatch sends from a rank to experts on others.",
                    "Compare with the links: near their limit, keep expert parallelism within a node.",
                    BYTES_PER_SECOND,
                    (Query(_rate("routed_bytes_total"), RANK),),
                ),
                Panel(
                    "Routed tokens",
                    "Token copies that dispatch sends from a rank to experts on others.",
                    "Ranks that send far more than others hold the longer batches: look at routing between groups.",
                    count("tokens/s"),
                    (Query(_rate("routed_tokens_total"), RANK),),
                ),
            ),
        ),
        Row(
            "What the hardware does",
            (
                Panel(
                    "Memory bandwidth used",
                    "Bytes of weights and KV cache that steps must read, of the peak of all ranks. Only where the "
                    "placement states `peak_bandwidth_per_rank`.",
                    "Decoding should be near the peak. Low with high synchronization: lower `-tp`. Low with a small "
                    "batch: there is not enough work.",
                    SHARE,
                    (Query(f"ridgewalk_model_bandwidth_utilization{{{PLACEMENT}}}", REPLICA),),
                    width=12,
                ),
                Panel(
                    "FLOPs used",
                    "FLOPs of useful tokens, recomputed ones excluded, of the peak of all ranks. Only where the "
                    "placement states `peak_flops_per_rank`.",
                    "Low is normal when decoding. If it falls while requests wait, see the capacity trap.",
                    SHARE,
                    (Query(f"ridgewalk_model_flops_utilization{{{PLACEMENT}}}", REPLICA),),
                    width=12,
                ),
            ),
        ),
    ),
)
