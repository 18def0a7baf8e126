"""Posterior accuracy of the trained networks, and the Pareto front it implies.

One training's accuracy is noisy: the noise of its seed is as large as the differences that matter,
so the best single training is overestimated (winner's curse). The surrogate estimates the noise and
each network's expected accuracy from all trainings; the front is drawn by these estimates.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.kernel import Coordinates, CostedSpace, Features
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.pareto import Points
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.study.front import objective_points, objective_value
from widthsearch.study.trial import Architecture, Trial, TrialState

ENOUGH = 8
"""Finished trainings that the surrogate needs; with fewer, the mean of each network's trainings
stands for its expected accuracy."""

INTERVAL = 1.645
"""Standard deviations to each side that hold 90% of a normal distribution."""

_DRAWS = 2048


@dataclass(frozen=True)
class AccuracyEstimate:
    """The posterior of one network's accuracy.

    Attributes:
        accuracy: Its mean: expected accuracy over seeds, in percent.
        sd: Its standard deviation, in percent; None where there is no surrogate.
        trainings: The number of its finished trainings.
        dominated: The probability that another trained network within the limits dominates it: one
            with no more of any cost and a higher accuracy; None where there is no surrogate.

    Example:
        >>> AccuracyEstimate(99.5, sd=1.0, trainings=2).interval
        (97.855, 100.0)
    """

    accuracy: float
    sd: float | None
    trainings: int
    dominated: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The central 90% interval, cut at 0% and 100%; None where there is no surrogate."""
        if self.sd is None:
            return None
        half = INTERVAL * self.sd
        return max(0.0, self.accuracy - half), min(100.0, self.accuracy + half)

    def to_json(self) -> dict[str, Any]:
        """The attributes and the interval as JSON values."""
        return {**asdict(self), "interval": self.interval}


class AccuracyPosterior:
    """The posterior of all trained networks' accuracies, and their front.

    Everything is computed when it is first asked for: the front takes one fit of the surrogate, the
    probabilities of being dominated take draws from the joint posterior.

    Args:
        trials: All trials of a study.
        spaces: Its spaces, or their records, by name.
        objectives: Its objectives.
        limits: The least and greatest values of costs: no network outside is on the front.

    Attributes:
        trials: The trials.
        objectives: The objectives.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.cost import Cost
        >>> from widthsearch.space.search_space import SearchSpace
        >>> from widthsearch.training.recipe import EpochResult
        >>> from widthsearch.widths import Widths
        >>> space = SearchSpace.from_model(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2)), (4,))
        >>> def trial(number, width, accuracy):
        ...     curve = (EpochResult(1, 0.1, accuracy, 1.0),)
        ...     cost, widths = Cost(100 * width, width, width), Widths(("0",), (width,))
        ...     finished = TrialState.FINISHED
        ...     return Trial(number, "net", widths, {}, 0, cost, curve=curve, state=finished)
        >>> trials = [trial(0, 8, 90.0), trial(1, 16, 92.0), trial(2, 16, 94.0), trial(3, 32, 91.0)]
        >>> posterior = AccuracyPosterior(trials, {"net": space}, ("accuracy", "macs"))
        >>> [(t.number, posterior[t].accuracy, posterior[t].trainings) for t in posterior.front()]
        [(0, 90.0, 1), (1, 93.0, 2)]
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        spaces: Mapping[str, CostedSpace],
        objectives: Sequence[str],
        limits: Mapping[Any, tuple[float, float]] | None = None,
    ) -> None:
        self.objectives = tuple(objectives)
        self._limits = limits or {}
        self.trials = trials
        self._spaces = spaces

    @cached_property
    def members(self) -> list[Trial]:
        """The first finished training of each architecture that has all objectives."""
        first: dict[Architecture, Trial] = {}
        points = objective_points(self.trials, self.objectives)
        for trial, point in zip(self.trials, points, strict=True):
            if trial.state == TrialState.FINISHED and not np.isnan(point).any():
                first.setdefault(trial.architecture, trial)
        return list(first.values())

    @property
    def base(self) -> Trial | None:
        """The trial of the first space's base; None until it has finished."""
        return next((t for t in self.members if t.origin.get("base")), None)

    @cached_property
    def coordinates(self) -> dict[str, Coordinates]:
        """Those of the spaces with a finished trial, by name."""
        trained = {trial.space for trial in self.trials if trial.accuracy is not None}
        names = [name for name in self._spaces if name in trained]
        placed = Coordinates.together([Coordinates.of(self._spaces[name]) for name in names])
        return dict(zip(names, placed, strict=True))

    @cached_property
    def surrogate(self) -> Surrogate | None:
        """Fitted to the trials of all spaces; None with fewer than ``ENOUGH`` finished ones."""
        trainings = {name: list[Observation]() for name in self.coordinates}
        for t in self.trials:
            if t.state in (TrialState.FINISHED, TrialState.STOPPED) and t.space in trainings:
                curve = tuple(result.accuracy for result in t.curve)
                trainings[t.space].append(Observation(t.widths.vector, t.accuracy, curve=curve))
        every = [training for own in trainings.values() for training in own]
        if sum(training.accuracy is not None for training in every) < ENOUGH:
            return None
        return Surrogate.fit_observations(
            *((self.coordinates[name], own) for name, own in trainings.items())
        )

    def __getitem__(self, trial: Trial) -> AccuracyEstimate:
        """The estimate of a finished trial's architecture."""
        return self._estimates[trial.architecture]

    def accuracy(self, trial: Trial) -> float:
        """The estimated accuracy of a finished trial's architecture, in percent."""
        return self._means[trial.architecture]

    def front(self) -> list[Trial]:
        """The members within the limits that no other dominates by estimated accuracy.

        Returns:
            The first training of each network of the front, fewest MACs first.
        """
        return list(self._front)

    @property
    def best_accuracy(self) -> float | None:
        """The estimated accuracy of the front's most accurate member; None for an empty front."""
        return max(map(self.accuracy, self._front), default=None)

    @cached_property
    def _front(self) -> list[Trial]:
        inside = self.members_within_limits
        kept = np.flatnonzero(pareto.non_dominated(self.points(inside)))
        return sorted((inside[i] for i in kept), key=lambda t: (t.cost.macs, t.number))

    @cached_property
    def members_within_limits(self) -> list[Trial]:
        """The members that may be on the front, in the members' order."""
        return [member for member in self.members if self._is_within(member)]

    def _is_within(self, member: Trial) -> bool:
        return all(
            low <= objective_value(member, name) <= high
            for name, (low, high) in self._limits.items()
        )

    @property
    def undecided(self) -> list[Trial]:
        """Members within the limits that are dominated with a probability from 5% to 95%.

        Returns:
            Those nearest to 50% first.
        """
        doubts = {t.number: self[t].dominated or 0.0 for t in self.members_within_limits}
        open_ = [t for t in self.members if 0.05 <= doubts.get(t.number, 0.0) <= 0.95]
        return sorted(open_, key=lambda t: (abs(doubts[t.number] - 0.5), t.number))

    def points(self, trials: Sequence[Trial]) -> Points:
        """Finished trials as points to minimise, (N, objectives), by estimated accuracy."""
        points = objective_points(trials, self.objectives)
        points[:, self.objectives.index("accuracy")] = [-self.accuracy(t) for t in trials]
        return points

    @cached_property
    def _trained(self) -> dict[Architecture, list[float]]:
        """The accuracy of each finished training."""
        trained: dict[Architecture, list[float]] = {}
        for trial in self.trials:
            if trial.accuracy is not None:
                trained.setdefault(trial.architecture, []).append(trial.accuracy)
        return trained

    @cached_property
    def _features(self) -> Features:
        """The members as the surrogate sees them, in their order."""
        seen, places = [], list[int]()
        for name, coordinates in self.coordinates.items():
            own = [i for i, member in enumerate(self.members) if member.space == name]
            if own:
                vectors = [self.members[i].widths.vector for i in own]
                seen.append(Features.of(coordinates, vectors))
                places += own
        return Features.concatenate(seen).rows(np.argsort(places))

    @cached_property
    def _means(self) -> dict[Architecture, float]:
        """The estimated accuracies."""
        means = {key: statistics.fmean(own) for key, own in self._trained.items()}
        if self.surrogate is not None and self.members:
            posterior = self.surrogate.posterior(self._features)
            for member, mean in zip(self.members, posterior.mean, strict=True):
                means[member.architecture] = min(max(float(mean), 0.0), 100.0)
        return means

    @cached_property
    def _joint(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and covariance of the members' expected accuracies, (N,) and (N, N)."""
        assert self.surrogate is not None
        return self.surrogate.joint_posterior(self._features)

    def mean_difference(self, pairs: Sequence[tuple[Trial, Trial]]) -> tuple[float, float]:
        """The mean over pairs of members of the difference of their accuracies, in points.

        Args:
            pairs: Minuend and subtrahend. A network may be in several pairs.

        Returns:
            The estimate, and its standard deviation: sqrt(wᵀ C w) with C the joint posterior
            covariance of the members and w the weight of each in the mean. It needs a surrogate.
        """
        place = {member.architecture: i for i, member in enumerate(self.members)}
        weights = np.zeros(len(self.members))
        for first, second in pairs:
            weights[place[first.architecture]] += 1 / len(pairs)
            weights[place[second.architecture]] -= 1 / len(pairs)
        mean = sum(self.accuracy(first) - self.accuracy(second) for first, second in pairs)
        variance = float(weights @ self._joint[1] @ weights)
        return mean / len(pairs), math.sqrt(max(0.0, variance))

    @cached_property
    def _estimates(self) -> dict[Architecture, AccuracyEstimate]:
        estimated = {
            key: AccuracyEstimate(mean, None, len(self._trained[key]))
            for key, mean in self._means.items()
        }
        if self.surrogate is None or not self.members:
            return estimated
        mean, covariance = self._joint
        draws = np.random.default_rng(0).multivariate_normal(
            mean, covariance, _DRAWS, check_valid="ignore", method="eigh"
        )
        points = objective_points(self.members, self.objectives)
        costs = np.delete(points, self.objectives.index("accuracy"), axis=1)
        within = np.array([self._is_within(member) for member in self.members])
        for i, member in enumerate(self.members):
            rivals = within & (costs <= costs[i]).all(axis=1)
            rivals[i] = False
            beaten = (draws[:, rivals] > draws[:, [i]]).any(axis=1).mean()
            estimated[member.architecture] = replace(
                estimated[member.architecture],
                sd=float(np.sqrt(covariance[i, i])),
                dominated=float(beaten),
            )
        return estimated
