"""The picture of a front: the metric against each cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from widthsearch.errors import StudyError
from widthsearch.report.console import short
from widthsearch.study.front import cost_value
from widthsearch.study.gains import baselines
from widthsearch.study.posterior import Estimate, MetricPosterior

if TYPE_CHECKING:
    from widthsearch.api import Study

_LABELS = {"macs": "MACs", "params": "parameters", "latency_ms": "latency (ms)"}

_PLACES = [(x, y) for y in (-9, 3, -17, 11) for x in (4, -4)]
"""Where an ID may stand beside its point, in points of a font; the first free one is taken."""


def draw_front(study: Study, posterior: MetricPosterior) -> Figure:
    """Every finished trial, the front with its IDs, and the baselines.

    One panel a cost. The front and the baselines are drawn at their estimated value, with its
    90% interval; the front is that of the study, over all of its objectives. Its members that
    tables mark with a question mark are hollow.

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
    doubtful = [t for t in front if posterior[t].doubtful]
    sure = [t for t in front if t not in doubtful]
    metric = posterior.metric
    costs = [name for name in study.config.objectives if name != metric.name] or ["macs"]
    figure = Figure(figsize=(5.6 * len(costs), 4.4), layout="constrained")
    panels = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    panels[0].set_ylabel(f"validation {metric.title}")
    for axes, cost in zip(panels, costs, strict=True):
        value = partial(cost_value, cost=cost)
        x = [value(t) for t in finished]
        axes.plot(x, [t.value for t in finished], ".", color="0.7", label="one training")
        for label, members, marker, size, fill, colour in (
            ("other baselines, estimated", others, "^", 7, "none", "tab:green"),
            ("uniform, estimated", uniform, "s", 7, "none", "tab:blue"),
            ("front, estimated", sure, "o", 4, "full", "tab:red"),
            ("front, P(dominated) > ½ (?)", doubtful, "o", 4, "none", "tab:red"),
        ):
            if members:
                axes.errorbar(
                    [value(t) for t in members],
                    [posterior.value(t) for t in members],
                    np.array([_error(posterior[t]) for t in members]).T,
                    fmt=marker,
                    markersize=size,
                    fillstyle=fill,
                    capsize=2,
                    color=colour,
                    label=label,
                )
        axes.set_xscale("log")
        several = max(x) > 4 * min(x)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if several else MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda tick, _: short(tick))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_LABELS.get(cost, cost))
        axes.grid(alpha=0.3)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5 if len(costs) > 1 else 2,
        fontsize=8,
    )
    figure.suptitle(
        f"{study.config.name}: front by estimated {metric.name}, bars are 90% intervals"
    )
    drawn = [*front, *(t for t in every if t not in front)]
    figure.draw_without_rendering()  # the places of points are known from here on
    for axes, cost in zip(panels, costs, strict=True):
        places = [(cost_value(t, cost), posterior.value(t)) for t in front]
        bars = [(cost_value(t, cost), posterior[t]) for t in drawn]
        _annotate(axes, [str(t.number) for t in front], places, bars)
    return figure


def _annotate(
    axes: Axes,
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    bars: Sequence[tuple[float, Estimate]],
) -> None:
    """Name points, each where it hides the least of other names and of the intervals."""
    taken: list[Bbox] = []
    for x, estimate in bars:
        below, above = _error(estimate)
        ends = [(x, estimate.value - below), (x, estimate.value + above)]
        (left, low), (_, high) = axes.transData.transform(ends)
        taken.append(Bbox([[left - 1, low - 2], [left + 1, high + 2]]))
    for name, point in zip(names, points, strict=True):
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=7)
        place = min(_PLACES, key=lambda place: _hidden(_put(text, place), taken))
        taken.append(_put(text, place))


def _put(text: Annotation, place: tuple[int, int]) -> Bbox:
    """Move a name beside its point, and return the room that it takes."""
    text.xyann = place
    text.set_horizontalalignment("left" if place[0] > 0 else "right")
    return text.get_window_extent()


def _hidden(room: Bbox, taken: Sequence[Bbox]) -> float:
    """The area that a name would hide of what is there."""
    both = [Bbox.intersection(room, other) for other in taken]
    return sum(each.width * each.height for each in both if each is not None)


def _error(estimate: Estimate) -> tuple[float, float]:
    """The lengths of the 90% interval below and above the estimate."""
    low, high = estimate.interval or (estimate.value, estimate.value)
    return estimate.value - low, high - estimate.value
