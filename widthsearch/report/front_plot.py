"""The picture of a front: accuracy against each cost."""

from __future__ import annotations

from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from widthsearch.api import Study
from widthsearch.errors import StudyError
from widthsearch.report.console import short
from widthsearch.report.tables import baseline
from widthsearch.study.front import objective_value
from widthsearch.study.posterior import AccuracyEstimate, AccuracyPosterior

_LABELS = {"macs": "MACs", "params": "parameters", "latency_ms": "latency (ms)"}


def draw_front(study: Study, posterior: AccuracyPosterior) -> Figure:
    """Every finished trial, the front with its IDs, and the uniform and random baselines.

    One panel a cost. The front and the baselines are drawn at their estimated accuracy, with its
    90% interval; the front is that of the study, over all of its objectives.

    Args:
        study: A study that was run.
        posterior: Its posterior.

    Raises:
        StudyError: No trial has finished.
    """
    finished = [t for t in posterior.trials if t.accuracy is not None]
    if not finished:
        raise StudyError(f"no trial of {study.config.name!r} has finished: run the study first")
    front = posterior.front()
    costs = [name for name in study.config.objectives if name != "accuracy"] or ["macs"]
    figure = Figure(figsize=(5.6 * len(costs), 4.4), layout="constrained")
    panels = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    panels[0].set_ylabel("validation accuracy (%)")
    for axes, cost in zip(panels, costs, strict=True):
        value = partial(objective_value, objective=cost)
        x = [value(t) for t in finished]
        axes.plot(x, [t.accuracy for t in finished], ".", color="0.7", label="one training")
        for label, members, marker, colour in (
            ("random", baseline(posterior, "random"), "^", "tab:green"),
            ("uniform", baseline(posterior), "s", "tab:blue"),
            ("front", front, "o", "tab:red"),
        ):
            if members:
                axes.errorbar(
                    [value(t) for t in members],
                    [posterior.accuracy(t) for t in members],
                    np.array([_error(posterior[t]) for t in members]).T,
                    fmt=marker,
                    markersize=4 if members is front else 7,
                    fillstyle="full" if members is front else "none",
                    capsize=2,
                    color=colour,
                    label=f"{label}, estimated",
                )
        for t in front:
            place = (value(t), posterior.accuracy(t))
            axes.annotate(str(t.number), place, (4, -9), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        several = max(x) > 4 * min(x)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if several else MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda tick, _: short(tick))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_LABELS[cost])
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=8)
    figure.suptitle(f"{study.config.name}: front by estimated accuracy, bars are 90% intervals")
    return figure


def _error(estimate: AccuracyEstimate) -> tuple[float, float]:
    """The lengths of the 90% interval below and above the estimate."""
    low, high = estimate.interval or (estimate.accuracy, estimate.accuracy)
    return estimate.accuracy - low, high - estimate.accuracy
