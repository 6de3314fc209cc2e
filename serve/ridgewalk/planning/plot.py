"""Throughput against time per token of every placement: the ridge between the two cliffs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ridgewalk.config import ConfigError
from ridgewalk.planning.planner import Candidate
from ridgewalk.planning.verdict import SYNCHRONIZATION, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    axes.set_title(f"{title}\nred rings: requests were preempted, the capacity cliff", fontsize=11)
    axes.set_xlabel("time per output token, median, ms")
    axes.set_ylabel("throughput, tokens/s")
    axes.margins(x=0.12, y=0.12)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, zorder=0)
    figure.draw_without_rendering()  # labels find their places by where the points come to lie
    _label(axes, [(name, (each.tpot_p50_s * 1e3, each.throughput_tokens_per_s)) for name, each in points + bounds])
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"--plot: {path} cannot be written: {error.strerror}") from None


def _label(axes: Axes, named: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Each name beside its point, at the first of some places where it covers no other name."""
    taken: list[tuple[float, float, float]] = []  # left, right, height: in pixels
    for name, point in named:
        x, y = axes.transData.transform(point)
        width = 7.5 * len(name)
        places = [(side, shift) for shift in (4, -13, 17, -26, 30, -39) for side in (7.0, -7.0 - width)]
        free = [
            (side, shift)
            for side, shift in places
            if all(x + side > right or x + side + width < left or abs(y + shift - at) > 12 for left, right, at in taken)
        ]
        side, shift = (free or places)[0]
        taken.append((x + side, x + side + width, y + shift))
        axes.annotate(name, point, xytext=(side, shift), textcoords="offset pixels", fontsize=8)
