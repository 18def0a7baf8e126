"""Trials as values of the objectives, comparisons at equal cost, and picks from a front.

The front itself is :meth:`~widthsearch.study.posterior.MetricPosterior.front`: there is no other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from widthsearch.bayesopt.metric import ACCURACY, COSTS, EXACT_COSTS, Metric
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.pareto import Points, knee
from widthsearch.errors import StudyError, did_you_mean
from widthsearch.space.cost import Cost
from widthsearch.study.trial import Trial, TrialState

if TYPE_CHECKING:
    from widthsearch.study.posterior import MetricPosterior

Limits = Mapping[str, tuple[float, float]]
"""The least and greatest value of the metric or of costs, by name."""


def cost_value(trial: Trial, cost: str) -> float:
    """A trial's cost, or a number that its training reported; NaN where it has none."""
    if cost in COSTS:
        value = getattr(trial if cost == "latency_ms" else trial.cost, cost)
    else:
        value = trial.reported.get(cost)
    return math.nan if value is None else float(value)


def objective_value(trial: Trial, objective: str, metric: Metric) -> float:
    """A trial's value of an objective, in the objective's own unit; NaN where it has none."""
    if objective != metric.name:
        return cost_value(trial, objective)
    return math.nan if trial.value is None else trial.value


def is_within_limits(cost: Cost, limits: Limits) -> bool:
    """Whether exact costs are within a study's limits; its other limits are not checked."""
    return all(
        low <= getattr(cost, name) <= high
        for name, (low, high) in limits.items()
        if name in EXACT_COSTS
    )


def objective_points(
    trials: Sequence[Trial], objectives: Sequence[str], metric: Metric = ACCURACY
) -> Points:
    """The trials as points to minimise, (N, objectives): NaN where a value is missing."""
    sign = [-metric.sign if objective == metric.name else 1.0 for objective in objectives]
    values = [[objective_value(trial, name, metric) for name in objectives] for trial in trials]
    return np.array(values).reshape(len(trials), len(objectives)) * sign


def observation(
    trial: Trial,
    objectives: Sequence[str],
    metric: Metric = ACCURACY,
    predicted_ms: float = math.nan,
) -> Observation:
    """A trial as the sampler and early stopping see it.

    Args:
        trial: The trial.
        objectives: The objectives of the study.
        metric: Its metric.
        predicted_ms: Stands for a latency that is not measured.
    """
    costs = {name: cost_value(trial, name) for name in objectives if name != metric.name}
    if "latency_ms" in costs and trial.latency is None:
        costs["latency_ms"] = predicted_ms
    running = trial.state == TrialState.RUNNING
    return Observation(trial.widths.vector, trial.value, (*costs.values(),), trial.values, running)


def equal_cost_pairs(
    chosen: Sequence[Trial], rivals: Sequence[Trial], cost: str, goodness: Callable[[Trial], float]
) -> list[tuple[Trial, Trial]]:
    """The best chosen trial that costs no more than a rival, with the rival.

    Args:
        chosen: Finished trials.
        rivals: Finished trials, e.g. a baseline.
        cost: ``macs``, ``params`` or ``latency_ms``.
        goodness: The estimate of a trial, higher for better ones.

    Returns:
        One pair for each rival that can be compared: one than which some chosen trial costs no
        more.
    """
    pairs = []
    for rival in rivals:
        limit = cost_value(rival, cost)
        within = [trial for trial in chosen if cost_value(trial, cost) <= limit]
        if within:
            pairs.append((max(within, key=goodness), rival))
    return pairs


def pick(posterior: MetricPosterior, spec: str | int) -> Trial:
    """The front's member that ``spec`` names, or any finished trial by its ID.

    ``best`` is the best by the metric, ``cheapest`` the one with the least of the first cost among
    the objectives, ``knee`` the one of greatest bulge over the objectives, and a number the trial
    of that ID. Limits, such as ``macs<=2e6`` or ``latency_ms<=0.5, params<=1e5``, pick the best
    within them; with one on the metric, such as ``miou>=65`` or ``rmse<=3, macs<=2e6``, they pick
    the cheapest. A limit on the metric goes by the estimate, whose interval may reach beyond it.

    Args:
        posterior: The posterior of the study, which has the front and the trials.
        spec: The name, limits or ID.

    Raises:
        StudyError: The spec is none of these, or no member fits it.
    """
    front = posterior.front()
    finished = [t.number for t in posterior.trials if t.state == TrialState.FINISHED]
    if not finished:
        raise StudyError(f"a pick needs a front, but {spec!r} picks from none: run the study first")

    def best(members: Sequence[Trial]) -> Trial:
        return max(members, key=lambda t: (posterior.goodness(t), -t.cost.macs, -t.number))

    def cheapest(members: Sequence[Trial]) -> Trial:
        cost = next((name for name in posterior.objectives if name != metric.name), "macs")
        return min(members, key=lambda t: (cost_value(t, cost), -posterior.goodness(t), t.number))

    metric, spec = posterior.metric, str(spec).strip()
    if spec.isdecimal():
        known = {trial.number: trial for trial in posterior.trials}
        named = known.get(int(spec))
        if named is not None and named.state == TrialState.FINISHED:
            return named
        some = [*map(str, finished)]
        raise StudyError(
            f"a picked ID must be a finished trial's, but {spec} "
            f"{f'has {named.state}' if named else 'is none'}; finished are "
            f"{', '.join(some[:8])}{', …' if len(some) > 8 else ''}, and on the front "
            f"{', '.join(str(member.number) for member in front) or 'none'}"
        )
    if not front:
        raise StudyError(
            f"a pick needs a front, but {spec!r} picks from none: no finished trial has all "
            "objectives and is within the limits; change `limits`, or pick one by its ID"
        )
    if spec == "knee":
        return front[knee(posterior.points(front))]
    if spec in ("best", "cheapest"):
        return (best if spec == "best" else cheapest)(front)
    within, limits = front, pick_limits(posterior, spec)
    for name, is_least, limit in limits:
        values = {
            t.number: posterior.value(t) if name == metric.name else cost_value(t, name)
            for t in within
        }
        numbers = [value for value in values.values() if not math.isnan(value)]
        whose = "of the front" if within is front else "among those within the other limits"
        within = [
            t
            for t in within
            if (values[t.number] >= limit if is_least else values[t.number] <= limit)
        ]
        if not within:
            word, end = ("greatest", max) if is_least else ("least", min)
            reason = f"no member of the front has a {name}"
            if numbers:
                reason = f"the {word} {name} {whose} is {end(numbers):g}"
            raise StudyError(
                f"a pick's limits must leave a member of the front, but {spec!r} leaves none; "
                f"{reason}"
            )
    return (cheapest if any(name == metric.name for name, _, _ in limits) else best)(within)


class PickLimit(NamedTuple):
    """A limit of a pick, such as ``rmse<=3``.

    Attributes:
        name: The metric, a cost, or another number that trainings reported.
        is_least: Whether it is the least value, and not the greatest.
        value: The value.

    Example:
        >>> str(PickLimit("macs", False, 2e6))
        'macs<=2e+06'
    """

    name: str
    is_least: bool
    value: float

    def __str__(self) -> str:
        return f"{self.name}{'>=' if self.is_least else '<='}{self.value:g}"


PICKS = ("best", "cheapest", "knee")
"""The picks by name."""


def pick_limits(posterior: MetricPosterior, spec: str | int) -> list[PickLimit]:
    """The limits that a pick consists of; none for a name or an ID.

    Raises:
        StudyError: It is neither; the message names the part that is wrong, and what is possible.
    """
    spec = str(spec).strip()
    if spec in PICKS or spec.isdecimal():
        return []
    names = [posterior.metric.name, *posterior.objectives, *COSTS, *posterior.others]
    known = list(dict.fromkeys(names))
    if not re.search("[<>=]", spec):
        rule = f"a pick must be {', '.join(PICKS)}, a finished trial's ID, or limits"
        way = f"limits are such as 'macs<=2e6', on {', '.join(known)}"
        raise StudyError(f"{rule}, but was {spec!r}; {did_you_mean(spec, [*PICKS, *known], way)}")
    return [_limit(part.strip(), spec, known) for part in spec.split(",")]


def _limit(part: str, spec: str, known: Sequence[str]) -> PickLimit:
    parts = re.fullmatch(r"([^<>=]*?)\s*([<>])=\s*([^<>=]*)", part)
    if parts is None:
        raise StudyError(
            "each limit of a pick must be name<=number or name>=number, separated by commas, but "
            f"{spec!r} has {part!r}"
        )
    name, sign, number = parts.groups()
    if name not in known:
        raise StudyError(
            f"a pick's limits must be on {', '.join(known)}, but {part!r} is on {name!r}; "
            f"{did_you_mean(name, known, 'name one of these')}"
        )
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if math.isnan(limit):
        raise StudyError(
            f"a pick's limit must be a number such as 2e6, but {part!r} has {number!r}"
        )
    return PickLimit(name, sign == ">", limit)
