"""A rank check as tables."""

from __future__ import annotations

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from widthsearch.report.console import short
from widthsearch.report.tables import origin_text
from widthsearch.study.rank_correlation import ENOUGH, RATES, RankCheck, kendall, spearman


def rank_tables(name: str, check: RankCheck) -> Group:
    """The networks by both recipes with the rank correlation, and by the learning rate.

    Args:
        name: The study's name.
        check: The rank check.
    """
    metric = check.metric

    def mean(values: list[float]) -> str:
        return metric.text(float(np.mean(values))) if np.isfinite(values).all() else "diverged"

    table = Table(title=f"{name}: {metric.title} by the study's recipe and by a full one")
    for column in ("id", "origin", "MACs", *(f"{epochs} epochs" for epochs in check.epochs)):
        table.add_column(column, justify="left" if column == "origin" else "right")
    for trial, *both in zip(check.members, check.short, check.full, strict=True):
        cells = [mean(values.tolist()) for values in both]
        origin = Text(origin_text(trial.origin))
        table.add_row(str(trial.number), origin, short(trial.cost.macs), *cells)
    tau, rho = (check.correlation(statistic) for statistic in (kendall, spearman))
    count = len(check.members)
    by = (
        f"{count} networks are too few for an interval, which needs {ENOUGH}"
        if tau.interval is None
        else "by a bootstrap over networks and seeds"
    )
    parts: list[RenderableType] = [
        table,
        Text(
            f"Kendall's τ {tau}, Spearman's ρ {rho}; {by}; {check.chance():.2%} of all orders "
            "agree as well"
        ),
    ]
    if check.lr is None:
        return Group(*parts, Text("the recipe has no lr, so no other learning rate was tried"))
    rates = Table(title=f"{metric.title} by the learning rate, {check.epochs[0]} epochs")
    for column in ("id", "MACs", *(f"lr {check.lr * rate:g}" for rate in RATES), "best"):
        rates.add_column(column, justify="right")
    for i, trial in enumerate(check.rated):
        means = np.nan_to_num(metric.sign * check.rates[:, i].mean(axis=1), nan=-np.inf)
        best = f"{check.lr * RATES[int(means.argmax())]:g}"
        cells = [mean(values[i].tolist()) for values in check.rates]
        rates.add_row(str(trial.number), short(trial.cost.macs), *cells, best)
    parts.append(rates)
    for i, rate in enumerate(RATES):
        if rate != 1:
            parts.append(
                Text(
                    f"at lr {check.lr * rate:g}: Kendall's τ with the order at lr {check.lr:g} is "
                    f"{check.rate_correlation(i):.2f}"
                )
            )
    notes = (
        "of three networks τ without ties can only be -1, -0.33, 0.33 or 1, and one order in six "
        "agrees wholly by chance",
        "narrow networks whose best lr differs from that of wide ones are not ranked fairly",
    )
    return Group(*parts, *map(Text, notes))
