"""The picture of a front: accuracy against each cost."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from widthsearch.api import Study
from widthsearch.report.tables import baseline
from widthsearch.study.front import objective_value
from widthsearch.study.posterior import INTERVAL


def plot_front(study: Study, path: Path) -> None:
    """Accuracy against each cost: every finished trial, the front, and the uniform baseline."""
    outcomes, posterior = study.trials(), study.posterior()
    finished = [o for o in outcomes if o.state == "finished"]
    costs = [name for name in study.config.objectives if name != "accuracy"] or ["macs"]
    figure = Figure(figsize=(5.2 * len(costs), 4), layout="constrained")
    FigureCanvasAgg(figure)
    labels = {"macs": "MACs", "params": "parameters", "latency_ms": "latency (ms)"}
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        value = partial(objective_value, objective=cost)
        front = posterior.front()
        axes.plot(
            [value(o) for o in finished],
            [o.accuracy for o in finished],
            marker=".",
            linestyle="",
            color="0.7",
            label="one training",
        )
        for members, style in (
            (
                baseline(outcomes),
                {"marker": "s", "linestyle": "--", "color": "tab:blue", "label": "uniform"},
            ),
            (front, {"marker": "o", "linestyle": "-", "color": "tab:red", "label": "front"}),
        ):
            points = sorted(
                (value(o), posterior.accuracy(o), INTERVAL * (posterior[o].sd or 0.0))
                for o in members
            )
            if points:
                x, y, error = zip(*points, strict=True)
                axes.errorbar(x, y, error, capsize=2, **style)
        axes.set_xscale("log")
        axes.set_xlabel(labels[cost])
        axes.set_ylabel("validation accuracy (%), believed with 90% interval")
        axes.grid(alpha=0.3, which="both")
        if finished:
            axes.legend()
    figure.suptitle(study.config.name)
    figure.savefig(path, dpi=120)
