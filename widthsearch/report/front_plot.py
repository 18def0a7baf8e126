"""The picture of a front: the metric against each cost."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from widthsearch.errors import StudyError
from widthsearch.report.console import short
from widthsearch.study.front import cost_value
from widthsearch.study.gains import baselines
from widthsearch.study.posterior import Estimate, MetricPosterior

if TYPE_CHECKING:
    from widthsearch.api import Study

_LABELS = {"macs": "MACs", "params": "parameters", "latency_ms": "latency (ms)"}


def draw_front(study: Study, posterior: MetricPosterior) -> Figure:
    """Every finished trial, the front with its IDs, and the baselines.

    One panel a cost. The front and the baselines are drawn at their estimated value, with its
    90% interval; the front is that of the study, over all of its objectives.

    Args:
        study: A study that was run.
        posterior: Its posterior.

    Raises:
        StudyError: No trial has finished.
    """
    finished = [t for t in posterior.trials if t.value is not None]
    if not finished:
        raise StudyError(f"no trial of {study.config.name!r} has finished: run the study first")
    front, every = posterior.front(), baselines(posterior)
    uniform = [t for t in every if t.origin.get("base") or t.origin["proposer"] == "uniform"]
    others = [t for t in every if t not in uniform]
    metric = posterior.metric
    costs = [name for name in study.config.objectives if name != metric.name] or ["macs"]
    figure = Figure(figsize=(5.6 * len(costs), 4.4), layout="constrained")
    panels = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    panels[0].set_ylabel(f"validation {metric.title}")
    for axes, cost in zip(panels, costs, strict=True):
        value = partial(cost_value, cost=cost)
        x = [value(t) for t in finished]
        axes.plot(x, [t.value for t in finished], ".", color="0.7", label="one training")
        for label, members, marker, colour in (
            ("other baselines", others, "^", "tab:green"),
            ("uniform", uniform, "s", "tab:blue"),
            ("front", front, "o", "tab:red"),
        ):
            if members:
                axes.errorbar(
                    [value(t) for t in members],
                    [posterior.value(t) for t in members],
                    np.array([_error(posterior[t]) for t in members]).T,
                    fmt=marker,
                    markersize=4 if members is front else 7,
                    fillstyle="full" if members is front else "none",
                    capsize=2,
                    color=colour,
                    label=f"{label}, estimated",
                )
        for t in front:
            place = (value(t), posterior.value(t))
            axes.annotate(str(t.number), place, (4, -9), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        several = max(x) > 4 * min(x)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if several else MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda tick, _: short(tick))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_LABELS.get(cost, cost))
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=8)
    figure.suptitle(
        f"{study.config.name}: front by estimated {metric.name}, bars are 90% intervals"
    )
    return figure


def _error(estimate: Estimate) -> tuple[float, float]:
    """The lengths of the 90% interval below and above the estimate."""
    low, high = estimate.interval or (estimate.value, estimate.value)
    return estimate.value - low, high - estimate.value
