"""`Panel`: one panel as data. Each says its unit, what it shows and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    DataSourceRef,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import DataTransformerConfig, Threshold, ThresholdsMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Kind = Literal["graph", "number", "table"]

SHARE, SECONDS, BYTES, BYTES_PER_SECOND = "percentunit", "s", "bytes", "Bps"
GRAPH_HEIGHT, NUMBER_HEIGHT = 8, 4


def count(noun: str) -> str:
    """The unit of a number of things."""
    return f"suffix: {noun}"


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the legend of its series."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel. ``limits``: from where values are yellow and red; descending when low values are the bad ones."""

    title: str
    shows: str
    act: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "graph"
    width: int = 8  # of 24 columns
    limits: tuple[float, float] | None = None
    maximum: float | None = None
    stacked: bool = False

    @property
    def description(self) -> str:
        """What Grafana shows beside the title."""
        return f"{self.shows}\n\n**What to do:** {self.act}"

    def builder(self, datasource: DataSourceRef, number: int) -> timeseries.Panel | stat.Panel | table.Panel:
        """In Grafana's own schema."""
        panel = {"graph": self._graph, "number": self._stat, "table": self._table}[self.kind]()
        panel = (
            panel.id(number)
            .title(self.title)
            .description(self.description)
            .datasource(datasource)
            .unit(self.unit)
            .span(self.width)
            .height(NUMBER_HEIGHT if self.kind == "number" else GRAPH_HEIGHT)
            .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(self._steps()))
        )
        if self.maximum is not None:
            panel = panel.max(self.maximum)
        for index, query in enumerate(self.queries):
            target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + index))
            if self.kind == "table":
                target = target.instant().format(PromQueryFormat.TABLE)
            panel = panel.with_target(target)
        return panel

    def _graph(self) -> timeseries.Panel:
        panel = (
            timeseries.Panel()
            .min(0)
            .line_width(1)
            .fill_opacity(60 if self.stacked else 10)
            .legend(
                common.VizLegendOptions()
                .show_legend(True)
                .display_mode(LegendDisplayMode.TABLE)
                .placement(LegendPlacement.BOTTOM)
                .calcs(["mean", "max", "lastNotNull"])
            )
            .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        )
        if self.stacked:
            panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
        if self.limits:
            panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
        return panel

    def _stat(self) -> stat.Panel:
        return (
            stat.Panel()
            .color_mode(BigValueColorMode.BACKGROUND if self.limits else BigValueColorMode.NONE)
            .graph_mode(BigValueGraphMode.AREA)
            .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        )

    def _table(self) -> table.Panel:
        hidden = dict.fromkeys(("Time", "Value", "__name__", "instance", "job"), True)
        return table.Panel().with_transformation(
            DataTransformerConfig(id_val="organize", options={"excludeByName": hidden, "indexByName": {}})
        )

    def _steps(self) -> list[Threshold]:
        if self.limits is None:
            return [Threshold(value=None, color="green")]
        yellow, red = self.limits
        colors = ("green", "yellow", "red") if yellow <= red else ("red", "yellow", "green")
        low, high = sorted(self.limits)
        return [Threshold(value=value, color=color) for value, color in zip((None, low, high), colors, strict=True)]
