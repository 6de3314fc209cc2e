"""What clients see: objectives, traffic, latency, the queue, errors, and whether we are seeing all of it."""

from __future__ import annotations

from monitoring.grafana.board import FIRING, MODEL, PLACEMENT, Board, Row
from monitoring.grafana.panel import SECONDS, SHARE, Panel, Query, count

JOB = 'job=~".*ridgewalk.*"'
NAMED = 'model_name=~"$model_name|"'
"""Also requests that named no model that is served."""

BURN = 14.4
"""Times the error budget of 5 %: `TtftSloBurn` and `ItlSloBurn` fire there."""


def percentiles(metric: str, matchers: str, labels: str) -> tuple[Query, ...]:
    """p50, p90 and p99 of a histogram, by labels."""
    legend = " ".join(f"{{{{{label}}}}}" for label in labels.split(", "))
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by ({labels}, le) "
            f"(rate({metric}_bucket{{{matchers}}}[$__rate_interval])))",
            f"{legend} p{share * 100:.0f}",
        )
        for share in (0.5, 0.9, 0.99)
    )


def objective(title: str, rule: str, within: str, act: str) -> Panel:
    """The share that misses an objective of 95 %."""
    return Panel(
        title,
        f"Share over the last 5 minutes that took longer than {within}. The objective allows 5 %; red is {BURN} times "
        "that, where the alert fires if the last hour is as bad.",
        act,
        SHARE,
        (Query(f"{rule}{{{MODEL}}}", "{{model_name}}"),),
        kind="number",
        width=5,
        limits=(0.05, BURN * 0.05),
    )


SERVICE = Board(
    "ridgewalk-service",
    "Service",
    "What clients see of the service, and its objectives. Start here; the other dashboards say why.",
    (
        Row(
            "Objectives",
            (
                Panel(
                    "Answers scrapes",
                    "1 while an ingress answers Prometheus.",
                    "At 0 no figure below is current: look at the service's process; on a cluster, `serve status`.",
                    "none",
                    (Query(f"min(up{{{JOB}}})", "up"),),
                    kind="number",
                    width=3,
                    limits=(1, 0.5),
                ),
                objective(
                    "First tokens over 1 s",
                    "ridgewalk:ttft_slo_errors:ratio_rate5m",
                    "1 s from a request's headers to its first token",
                    "See *Queue*. If requests wait, add replicas or KV cache; if not, prompts are long: lower "
                    "`--max-num-batched-tokens` or raise `-tp`.",
                ),
                objective(
                    "Tokens over 100 ms",
                    "ridgewalk:itl_slo_errors:ratio_rate5m",
                    "100 ms after the token before",
                    "Lower `--max-num-seqs` (smaller batches step faster) or `--max-num-batched-tokens` (shorter "
                    "prefill chunks beside decodes), then see *Synchronization*.",
                ),
                Panel(
                    "First token, p99",
                    "99 of 100 requests of the last 5 minutes had their first token within this.",
                    "See *Latency* for when it rose and *Queue* for whether requests waited.",
                    SECONDS,
                    (Query(f"ridgewalk:ttft_seconds_p99:rate5m{{{MODEL}}}", "{{model_name}}"),),
                    kind="number",
                    width=4,
                    limits=(1, 5),
                ),
                Panel(
                    "Between tokens, p99",
                    "99 of 100 tokens of the last 5 minutes came within this after the token before.",
                    "See *Latency*, then the step's parts in *Synchronization*.",
                    SECONDS,
                    (Query(f"ridgewalk:itl_seconds_p99:rate5m{{{MODEL}}}", "{{model_name}}"),),
                    kind="number",
                    width=4,
                    limits=(0.1, 0.3),
                ),
                Panel(
                    "Alerts",
                    "Alerts that fire now. Red lines in all graphs mark when they did.",
                    "Read the alert's runbook, under Alerts in Prometheus or in the message of Alertmanager.",
                    count("firing"),
                    (Query(f"count({FIRING}) or vector(0)", "firing"),),
                    kind="number",
                    width=3,
                    limits=(1, 3),
                ),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Requests",
                    "Requests that passed all checks, by model and endpoint.",
                    "If it falls while clients complain, see *Errors*: refused requests are not in it.",
                    "reqps",
                    (
                        Query(
                            "sum by (model_name, endpoint) "
                            f"(rate(ridgewalk_requests_total{{{MODEL}}}[$__rate_interval]))",
                            "{{model_name}} {{endpoint}}",
                        ),
                    ),
                ),
                Panel(
                    "Tokens",
                    "Tokens sampled, and prompt tokens of admitted sequences.",
                    "The ceiling is the placement's. At the ceiling with requests waiting: more replicas, or a better "
                    "placement (*Placements and routing*).",
                    count("tokens/s"),
                    (
                        Query(
                            "sum by (model_name) "
                            f"(rate(ridgewalk_generation_tokens_total{{{PLACEMENT}}}[$__rate_interval]))",
                            "{{model_name}} generated",
                        ),
                        Query(
                            "sum by (model_name) "
                            f"(rate(ridgewalk_prompt_tokens_total{{{PLACEMENT}}}[$__rate_interval]))",
                            "{{model_name}} prompt",
                        ),
                    ),
                ),
                Panel(
                    "Ended sequences",
                    "Sequences that ended, by why: stop, length, abort (the client left), error.",
                    "Many `length`: max_tokens cuts reasoning off. Many `abort`: clients give up, see *Latency*. Any "
                    "`error`: read the replica's log.",
                    count("sequences/s"),
                    (
                        Query(
                            "sum by (model_name, finished_reason) "
                            f"(rate(ridgewalk_sequences_ended_total{{{PLACEMENT}}}[$__rate_interval]))",
                            "{{model_name}} {{finished_reason}}",
                        ),
                    ),
                ),
                Panel(
                    "Prompt length",
                    "Prompt tokens of finished prompts.",
                    "Longer prompts need more prefill: if first tokens become slow, compare with this.",
                    count("tokens"),
                    percentiles("ridgewalk_request_prompt_tokens", MODEL, "model_name"),
                    width=12,
                ),
                Panel(
                    "Output length",
                    "Output tokens of finished sequences. The KV cache holds what runs: twice the length, half the "
                    "sequences.",
                    "If it grows, expect *KV and the capacity cliff*: plan the placement for the new lengths.",
                    count("tokens"),
                    percentiles("ridgewalk_request_generation_tokens", MODEL, "model_name"),
                    width=12,
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Panel(
                    "First token",
                    "From a request's headers to its first token.",
                    "If *Time in the queue* is most of it, add replicas or KV; else lower `--max-num-batched-tokens`.",
                    SECONDS,
                    percentiles("ridgewalk_time_to_first_token_seconds", MODEL, "model_name"),
                    limits=(1, 5),
                ),
                Panel(
                    "Between tokens",
                    "Between consecutive tokens of a sequence.",
                    "It follows the step's time: see its parts in *Synchronization*. Spikes: preemptions, or prefill "
                    "chunks that are too long.",
                    SECONDS,
                    percentiles("ridgewalk_inter_token_latency_seconds", MODEL, "model_name"),
                    limits=(0.1, 0.3),
                ),
                Panel(
                    "Whole sequence",
                    "From a request's headers to the end of each of its sequences.",
                    "Output length times the time between tokens, plus the first. Look for which of the three grew.",
                    SECONDS,
                    percentiles("ridgewalk_e2e_request_latency_seconds", MODEL, "model_name"),
                ),
            ),
        ),
        Row(
            "Queue",
            (
                Panel(
                    "Running",
                    "Sequences that hold KV blocks.",
                    "Flat at `--max-num-seqs` while requests wait: raise it, if the KV cache has room.",
                    count("sequences"),
                    (
                        Query(
                            f"sum by (model_name, placement) (ridgewalk_num_requests_running{{{PLACEMENT}}})",
                            "{{model_name}} {{placement}}",
                        ),
                    ),
                ),
                Panel(
                    "Waiting",
                    "Sequences not admitted yet, preempted ones included. At `--max-waiting` clients get 429.",
                    "See *KV and the capacity cliff*: waiting with a full cache wants KV, with room it wants "
                    "`--max-num-seqs` or replicas.",
                    count("sequences"),
                    (
                        Query(
                            f"sum by (model_name, placement) (ridgewalk_num_requests_waiting{{{PLACEMENT}}})",
                            "{{model_name}} {{placement}}",
                        ),
                    ),
                ),
                Panel(
                    "Time in the queue",
                    "From a sequence's arrival at its replica to its first schedule.",
                    "This is latency that only capacity removes: more replicas, or KV.",
                    SECONDS,
                    percentiles("ridgewalk_request_queue_time_seconds", PLACEMENT, "model_name, placement"),
                    limits=(0.5, 5),
                ),
            ),
        ),
        Row(
            "Errors",
            (
                Panel(
                    "Finished as asked",
                    "Sequences that ended as the client asked: with the model's end (stop) or at max_tokens (length).",
                    "If it falls and requests do not, see the two beside it and *Ended sequences*.",
                    count("sequences/s"),
                    (
                        Query(
                            "sum by (model_name, finished_reason) "
                            f"(rate(ridgewalk_request_success_total{{{MODEL}}}[$__rate_interval]))",
                            "{{model_name}} {{finished_reason}}",
                        ),
                    ),
                ),
                Panel(
                    "Errors by status",
                    "Requests that ended in an error, also within a stream. Without a model: the request named none "
                    "that is served. 499: the client left.",
                    "400 and 404 are the clients' to mend. 429: the queue is full, add capacity. 5xx: read the logs of "
                    "the ingress and of the replica.",
                    "reqps",
                    (
                        Query(
                            "sum by (model_name, status) "
                            f"(rate(ridgewalk_request_errors_total{{{NAMED}}}[$__rate_interval]))",
                            "{{model_name}} {{status}}",
                        ),
                    ),
                ),
                Panel(
                    "Our own errors",
                    "Requests that ended in a 5xx; nothing a client sends should cause one.",
                    "Any is a fault: read the logs of ingress and replica at that time, and see whether replicas died "
                    "(*Placements and routing*).",
                    "reqps",
                    (
                        Query(
                            "sum by (model_name) "
                            f'(rate(ridgewalk_request_errors_total{{{NAMED},status=~"5.."}}[$__rate_interval])) or '
                            f"0 * sum by (model_name) (rate(ridgewalk_requests_total{{{MODEL}}}[$__rate_interval]))",
                            "{{model_name}} 5xx",
                        ),
                    ),
                    limits=(0.001, 0.1),
                ),
            ),
        ),
        Row(
            "What Prometheus sees",
            (
                Panel(
                    "Scrape duration",
                    "How long the service took to answer for all its processes. A replica that does not answer costs "
                    "most of the scrape timeout.",
                    "Over 0.2 s: look for missing replicas beside this; else for cores that are all busy.",
                    SECONDS,
                    (Query(f"scrape_duration_seconds{{{JOB}}}", "{{instance}}"),),
                    width=6,
                    limits=(0.2, 1),
                ),
                Panel(
                    "Missing from the scrape",
                    "Replicas that shall run, and ingresses, that did not answer in time. Their figures are absent.",
                    "They start, stop, or hang. If it lasts, read the log of the replica that is missing from "
                    "*Placements and routing*.",
                    count("processes"),
                    (
                        Query(
                            f"ridgewalk_scrape_missing_replicas{{{PLACEMENT}}}", "{{model_name}} {{placement}} replicas"
                        ),
                        Query("ridgewalk_scrape_missing_ingresses", "ingresses"),
                    ),
                    width=6,
                    limits=(1, 2),
                ),
                Panel(
                    "Scrapes answered",
                    "Scrapes a second by the ingress that answered. Any of them answers for the whole service.",
                    "One of several answers none: harmless, the balancer may keep to one.",
                    "reqps",
                    (Query("rate(ridgewalk_scrapes_total[$__rate_interval])", "ingress {{ingress}}"),),
                    width=6,
                ),
                Panel(
                    "Series",
                    "Samples in a scrape. Bounded by the configuration, never by traffic.",
                    "If it grows without a new model, placement or replica, report it as a fault.",
                    count("samples"),
                    (Query(f"scrape_samples_scraped{{{JOB}}}", "{{instance}}"),),
                    width=6,
                ),
            ),
        ),
    ),
)
