"""`Board`: what one dashboard holds, as data, and what all of them share: variables, links, alert annotations."""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard, prometheus
from grafana_foundation_sdk.models.common import DataSourceRef
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from monitoring.grafana.panel import Panel

TAG = "ridgewalk"
DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

IN_SIGHT = ""
"""Not in a menu, where the SDK puts links and annotations."""

MODEL = 'model_name=~"$model_name"'
"""Matches the chosen models."""

PLACEMENT = f'{MODEL},placement=~"$placement"'
"""Matches the chosen placements of the chosen models: for what engine replicas record."""

FIRING = 'ALERTS{alertstate="firing",model_name=~"$model_name|"}'
"""Alerts of the chosen models, and those that belong to none."""


@dataclass(frozen=True)
class Row:
    """Panels under one heading, laid out from left to right, 24 columns wide."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]

    def build(self) -> Dashboard:
        """The dashboard in Grafana's own schema."""
        builder = (
            dashboard.Dashboard(f"Ridgewalk: {self.title}")
            .uid(self.uid)
            .description(self.description)
            .tags([TAG])
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .time("now-30m", "now")
            .refresh("10s")
            .timezone("browser")
            .editable()
            .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
            .with_variable(_variable("model_name", "Model", "label_values(ridgewalk_placement_info, model_name)"))
            .with_variable(
                _variable("placement", "Placement", f"label_values(ridgewalk_placement_info{{{MODEL}}}, placement)")
            )
            .annotation(_alerts())
            .link(
                dashboard.DashboardLink("Ridgewalk")
                .type(DashboardLinkType.DASHBOARDS)
                .tags([TAG])
                .include_vars(True)
                .keep_time(True)
                .placement(IN_SIGHT)
            )
        )
        number = 0
        for row in self.rows:
            number += 1
            builder = builder.with_row(dashboard.Row(row.title).id(number))
            for panel in row.panels:
                number += 1
                builder = builder.with_panel(panel.builder(DATASOURCE, number))
        return builder.build()


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query({"query": query, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _alerts() -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name("Alerts")
        .datasource(DATASOURCE)
        .enable(True)
        .placement(IN_SIGHT)
        .icon_color("red")
        .target(prometheus.Dataquery().expr(FIRING).ref_id("alerts"))
        .expr(FIRING)
        .title_format("{{alertname}}")
        .text_format("{{severity}}: {{model_name}} {{placement}} {{replica}}")
        .tag_keys("alertname,severity,model_name")
    )
