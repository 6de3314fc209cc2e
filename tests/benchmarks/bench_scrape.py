"""How long a scrape of the whole service takes. ``python -m tests.benchmarks.bench_scrape [--replicas 8]``.

`ridgewalk serve --with-prometheus` runs so many replicas of the dense demo model, one rank each, idle and under load;
the figures are Prometheus' own ``scrape_duration_seconds``, of one scrape every 2 s.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.monitoring.live_service import configuration, live_service, load

MODEL = "demo-dense"


def main() -> None:
    """Measure idle and loaded, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=30)
    arguments = parser.parse_args()
    config = configuration({MODEL: [{"replicas": arguments.replicas}]}, num_blocks=64)
    with tempfile.TemporaryDirectory() as folder, live_service(Path(folder), config) as service:

        def report(state: str) -> None:
            window = f'scrape_duration_seconds{{job="ridgewalk"}}[{arguments.seconds}s]'
            numbers = {
                "scrapes": service.query(f"count_over_time({window})"),
                "median": service.query(f"quantile_over_time(0.5, {window})"),
                "longest": service.query(f"max_over_time({window})"),
                "samples": service.query('scrape_samples_scraped{job="ridgewalk"}'),
                "incomplete": service.query(
                    f"sum(max_over_time(ridgewalk_scrape_missing_replicas[{arguments.seconds}s]))"
                ),
            }
            values = {name: float(found[0]["value"][1]) for name, found in numbers.items()}
            print(
                f"{arguments.replicas} replicas, {state}: {values['scrapes']:.0f} scrapes of {values['samples']:.0f} "
                f"samples, median {values['median'] * 1e3:.0f} ms, longest {values['longest'] * 1e3:.0f} ms, "
                f"replicas missing at most {values['incomplete']:.0f}",
                flush=True,
            )

        time.sleep(arguments.seconds + 5)  # Prometheus finds its target within 5 s
        report("idle")
        with load(service.url, {MODEL: arguments.clients}, max_tokens=120):
            time.sleep(arguments.seconds)
            report(f"{arguments.clients} clients")


if __name__ == "__main__":
    main()
