"""Networks that were trained from several starts: at equal cost, and at equal training compute.

Each comparison is within one network, with one seed, so its inference cost is equal. From
``scratch`` and ``extract`` it is trained for the same epochs; the base of the extracted weights is
then free. ``scratch_b`` has the epochs that make up for the base's training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from widthsearch.bayesopt.metric import Metric
from widthsearch.report.console import short, uncut
from widthsearch.study.trial import Trial, TrialState

if TYPE_CHECKING:
    from widthsearch.api import Study

_RIVALS: Mapping[str, str] = {"scratch": "cost", "scratch_b": "training compute"}
"""What is equal in a comparison of ``extract`` with each other start."""


@dataclass(frozen=True)
class StartGain:
    """By how much extracted weights are better than another start: the mean over networks.

    Attributes:
        rival: The other start.
        mean: The mean of the differences in the metric's unit; positive where ``extract`` is
            better, also for a metric to minimize.
        half: Half of its 90% interval, by Student's t; None with a single network.
        networks: The number of networks.

    Example:
        >>> StartGain("scratch_b", mean=0.5, half=0.25, networks=8).to_json()["interval"]
        [0.25, 0.75]
    """

    rival: str
    mean: float
    half: float | None
    networks: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        low, high = (None if self.half is None else self.mean + s * self.half for s in (-1, 1))
        interval = None if self.half is None else [low, high]
        return {
            "equal": _RIVALS[self.rival],
            "gain": self.mean,
            "interval": interval,
            "networks": self.networks,
        }


def compared(trials: Iterable[Trial]) -> list[dict[str, Trial]]:
    """The finished trials of each network that has several starts, by start; fewest MACs first."""
    finished = [trial for trial in trials if trial.state == TrialState.FINISHED]
    of_network = {t.number: {t.start: t} for t in finished if not t.is_comparison}
    for trial in finished:
        if trial.is_comparison and trial.origin["compares"] in of_network:
            of_network[trial.origin["compares"]][trial.start] = trial
    several = [by_start for by_start in of_network.values() if len(by_start) > 1]
    return sorted(several, key=lambda by_start: next(iter(by_start.values())).cost.macs)


def start_gains(networks: Sequence[Mapping[str, Trial]], metric: Metric) -> list[StartGain]:
    """The gain of extracted weights over each other start that some network has.

    Example:
        >>> from widthsearch.bayesopt.metric import ACCURACY
        >>> start_gains([], ACCURACY)
        []
    """
    gains = []
    for rival in _RIVALS:
        differences = [
            metric.sign * (of["extract"].value - of[rival].value)  # type: ignore[operator]
            for of in networks
            if "extract" in of and rival in of
        ]
        if not differences:
            continue
        count, half = len(differences), None
        if count > 1:
            error = statistics.stdev(differences) / math.sqrt(count)
            half = float(stdtrit(count - 1, 0.95)) * error
        gains.append(StartGain(rival, statistics.fmean(differences), half, count))
    return gains


def base_epochs(study: Study) -> float | None:
    """The epochs that the stored study's base weights were trained for; None if unknown."""
    from widthsearch.study.storage import Store  # Optuna, which reading a space does not need

    stored = Store.open(study.storage, study.config.name).attribute("weights") or {}
    epochs = stored.get("epochs")
    return None if epochs is None else float(epochs)


def starts_table(networks: Sequence[Mapping[str, Trial]], metric: Metric) -> Table:
    """The metric of each network by its start, with the epochs of ``scratch_b``."""
    table = Table(title="the same networks from several starts", box=box.SIMPLE_HEAD)
    starts = [s for s in ("scratch", "extract", "scratch_b") if any(s in of for of in networks)]
    for column in ("id", "MACs", *starts):
        table.add_column(column, justify="right", no_wrap=True)
    for of in networks:
        own = next(iter(of.values()))
        row = [str(own.number), short(own.cost.macs)]
        for start in starts:
            value = of[start].value if start in of else None
            text = "" if value is None else metric.text(value)
            epochs = of[start].origin.get("epochs") if start in of else None
            row.append(text + (f" ({epochs} epochs)" if epochs else ""))
        table.add_row(*map(Text, row))
    return uncut(table)


def start_lines(
    networks: Sequence[Mapping[str, Trial]],
    metric: Metric,
    base_epochs: float | None,
    base_macs: int | None,
) -> list[str]:
    """The gains, and the compute of the trainings; a line each.

    Args:
        networks: The trials of each network by start.
        metric: The metric.
        base_epochs: The epochs of the training of the base's weights; None where unknown.
        base_macs: The base's MACs.
    """
    lines, known = [], base_epochs is not None and base_macs is not None
    for gain in start_gains(networks, metric):
        own = next(iter(networks[0].values())).value or 0.0
        places = metric.decimals(own)
        half = "" if gain.half is None else f" ±{gain.half:.{places}f}"
        with_base = ", the base's included" if gain.rival == "scratch_b" else " and epochs"
        several = f"{gain.networks} network{'s' * (gain.networks > 1)}"
        lines.append(
            f"Gain of extracted weights over {gain.rival}: {gain.mean:+.{places}f}{half} "
            f"{metric.points} at equal {_RIVALS[gain.rival]}{with_base} (mean over {several}"
            f"{'; ± is its 90% interval' if half else ''})."
        )
    both = [of["extract"] for of in networks if "extract" in of]
    if not lines or not both:
        return lines
    if not known:
        lines.append(
            "The base's training is not counted: its epochs are unknown. Weights in a folder of "
            "`widthsearch train` have them."
        )
        return lines
    assert base_epochs is not None and base_macs is not None
    mean = statistics.fmean(trial.cost.macs * len(trial.curve) for trial in both)
    ratio = base_epochs * base_macs / mean
    line = f"The base's training took {ratio:.1f} times the compute (epochs × MACs) of a mean cut."
    if not any("scratch_b" in of for of in networks):
        line += " For a comparison at equal compute, add scratch_b to `start` in a new study."
    return [*lines, line]


def starts_json(networks: Sequence[Mapping[str, Trial]], metric: Metric) -> dict[str, Any]:
    """The gains by the other start, and the trials of each network by start, as JSON values."""
    return {
        "gains": {gain.rival: gain.to_json() for gain in start_gains(networks, metric)},
        "networks": [
            {start: {"id": t.number, metric.name: t.value} for start, t in of.items()}
            for of in networks
        ],
    }
