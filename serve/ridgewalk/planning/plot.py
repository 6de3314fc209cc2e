"""Throughput against time per token of every placement: the ridge between the two cliffs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ridgewalk.config import ConfigError
from ridgewalk.planning.planner import Candidate
from ridgewalk.planning.verdict import SYNCHRONIZATION, shares

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises ConfigError before anything is simulated: matplotlib is missing, or the file's kind is not drawn."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--plot: {path} should end in one of {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {path.parent} to write into; make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot: it needs matplotlib; install it with: pip install 'ridgewalk[bench]'") from None


def draw(ranked: Sequence[Candidate], title: str, path: Path) -> None:
    """One point a placement: coloured by its share of time between ranks, ringed when it preempted.

    Placements that were not simulated are crosses at their bounds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    loaded = [candidate for candidate in ranked if candidate.outcome is not None]
    points = [(each.placement.name, each.outcome) for each in loaded if each.simulated and each.outcome is not None]
    bounds = [(each.placement.name, each.outcome) for each in loaded if not each.simulated and each.outcome is not None]
    times = [outcome.tpot_p50_s * 1e3 for _, outcome in points]
    rates = [outcome.throughput_tokens_per_s for _, outcome in points]
    waits = [100 * sum(shares(outcome)[term] for term in SYNCHRONIZATION) for _, outcome in points]
    edges = ["tab:red" if outcome.preemptions else "none" for _, outcome in points]
    dots = axes.scatter(times, rates, c=waits, s=90, cmap="viridis", edgecolors=edges, linewidths=2, zorder=2)
    figure.colorbar(dots, label="share of time between ranks, %: the synchronization cliff")
    if bounds:
        axes.scatter(
            [outcome.tpot_p50_s * 1e3 for _, outcome in bounds],
            [outcome.throughput_tokens_per_s for _, outcome in bounds],
            c="tab:gray", marker="x", zorder=2, label="not simulated: at best there",
        )  # fmt: skip
        axes.legend(loc="upper right")
    for name, outcome in points + bounds:
        at = (outcome.tpot_p50_s * 1e3, outcome.throughput_tokens_per_s)
        axes.annotate(name, at, xytext=(7, 4), textcoords="offset points", fontsize=9)
    axes.set_title(f"{title}\nred rings: requests were preempted, the capacity cliff", fontsize=11)
    axes.set_xlabel("time per output token, median, ms")
    axes.set_ylabel("throughput, tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, zorder=0)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"--plot: {path} cannot be written: {error.strerror}") from None
