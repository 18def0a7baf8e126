"""Trials as values of the objectives, comparisons at equal cost, and picks from a front.

The front itself is :meth:`~widthsearch.study.posterior.AccuracyPosterior.front`: there is no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.pareto import Points, knee
from widthsearch.errors import StudyError
from widthsearch.space.cost import Cost
from widthsearch.study.trial import Trial, TrialState

if TYPE_CHECKING:
    from widthsearch.study.posterior import AccuracyPosterior

OBJECTIVES = ("accuracy", "macs", "params", "latency_ms")


def objective_value(trial: Trial, objective: str) -> float:
    """A trial's value of an objective, in the objective's own unit; NaN where it has none."""
    value = getattr(trial.cost if objective in ("macs", "params") else trial, objective)
    return math.nan if value is None else float(value)


def is_within_limits(cost: Cost, limits: Mapping[Any, tuple[float, float]]) -> bool:
    """Whether exact costs are within a study's limits; a limit of latency is not checked."""
    return all(
        low <= getattr(cost, name) <= high
        for name, (low, high) in limits.items()
        if name != "latency_ms"
    )


def objective_points(trials: Sequence[Trial], objectives: Sequence[str]) -> Points:
    """The trials as points to minimise, (N, objectives): accuracy negated, NaN where missing."""
    for objective in objectives:
        if objective not in OBJECTIVES:
            raise StudyError(
                f"an objective must be one of {', '.join(OBJECTIVES)}, but was {objective!r}"
            )
    sign = [-1.0 if objective == "accuracy" else 1.0 for objective in objectives]
    values = [[objective_value(trial, objective) for objective in objectives] for trial in trials]
    return np.array(values).reshape(len(trials), len(objectives)) * sign


def observation(
    trial: Trial, objectives: Sequence[str], predicted_ms: float = math.nan
) -> Observation:
    """A trial as the sampler and early stopping see it.

    Args:
        trial: The trial.
        objectives: The objectives of the study.
        predicted_ms: Stands for a latency that is not measured.
    """
    costs = {name: objective_value(trial, name) for name in objectives if name != "accuracy"}
    if "latency_ms" in costs and trial.latency is None:
        costs["latency_ms"] = predicted_ms
    curve = tuple(result.accuracy for result in trial.curve)
    running = trial.state == TrialState.RUNNING
    return Observation(trial.widths.vector, trial.accuracy, (*costs.values(),), curve, running)


def equal_cost_pairs(
    chosen: Sequence[Trial], rivals: Sequence[Trial], cost: str, accuracy: Callable[[Trial], float]
) -> list[tuple[Trial, Trial]]:
    """The most accurate chosen trial that costs no more than a rival, with the rival.

    Args:
        chosen: Finished trials.
        rivals: Finished trials, e.g. a baseline.
        cost: ``macs``, ``params`` or ``latency_ms``.
        accuracy: The estimated accuracy of a trial.

    Returns:
        One pair for each rival that can be compared: one than which some chosen trial costs no
        more.
    """
    pairs = []
    for rival in rivals:
        limit = objective_value(rival, cost)
        within = [trial for trial in chosen if objective_value(trial, cost) <= limit]
        if within:
            pairs.append((max(within, key=accuracy), rival))
    return pairs


def pick(posterior: AccuracyPosterior, spec: str | int) -> Trial:
    """The front's member that ``spec`` names, or any finished trial by its ID.

    ``best`` is the most accurate, ``knee`` the one of greatest bulge over the objectives, a number
    the trial of that ID, and a limit such as ``macs<=2e6``, ``params<=1e5`` or ``latency_ms<=0.5``
    the most accurate within it.

    Args:
        posterior: The posterior of the study, which has the front and the trials.
        spec: The name, limit or ID.

    Raises:
        StudyError: The spec is none of these, or no member fits it.
    """
    front = posterior.front()
    if not front:
        raise StudyError(f"a pick needs a front, but {spec!r} picks from none: run the study first")

    def most_accurate(members: Sequence[Trial]) -> Trial:
        return max(members, key=lambda t: (posterior.accuracy(t), -t.cost.macs, -t.number))

    spec = str(spec).strip()
    if spec == "knee":
        return front[knee(posterior.points(front))]
    if spec == "best":
        return most_accurate(front)
    if spec.isdecimal():
        known = {trial.number: trial for trial in posterior.trials}
        named = known.get(int(spec))
        if named is not None and named.state == TrialState.FINISHED:
            return named
        some = [str(t.number) for t in known.values() if t.state == TrialState.FINISHED]
        raise StudyError(
            f"a picked ID must be a finished trial's, but {spec} "
            f"{f'has {named.state}' if named else 'is none'}; finished are "
            f"{', '.join(some[:8])}{', …' if len(some) > 8 else ''}, and on the front "
            f"{', '.join(str(member.number) for member in front)}"
        )
    objective, limit = _limit(spec)
    values = [objective_value(member, objective) for member in front]
    within = [member for member, value in zip(front, values, strict=True) if value <= limit]
    if not within:
        measured = [value for value in values if not math.isnan(value)]
        least = f"no member of the front has a {objective}"
        if measured:
            least = f"the least {objective} on the front is {min(measured):g}"
        raise StudyError(
            f"a pick's limit must leave a member of the front, but {spec!r} leaves none; {least}"
        )
    return most_accurate(within)


def _limit(spec: str) -> tuple[str, float]:
    objective, _, number = (part.strip() for part in spec.partition("<="))
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if objective not in OBJECTIVES[1:] or math.isnan(limit):
        raise StudyError(
            "a pick must be a trial's ID, best, knee, or a limit on macs, params or latency_ms "
            f"such as 'macs<=2e6', but was {spec!r}"
        )
    return objective, limit
