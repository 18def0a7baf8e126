"""What is believed of networks that were trained: their accuracy, and who is on the front.

One training's accuracy is luck as much as merit: seed noise is as large as the differences that
matter, so the raw best is a winner's curse. The surrogate has learned the noise and what like
networks reached; the front is drawn by what it believes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.surrogate import Coordinates, Features, Surrogate, Training
from widthsearch.study.storage import SpaceRecord
from widthsearch.study.trial import Outcome
from widthsearch.widths import Widths

ENOUGH = 8
"""Finished trainings before the surrogate is asked; with fewer, means stand for it."""

INTERVAL = 1.645
"""Standard deviations to each side that hold 90% of a normal distribution."""

_DRAWS = 2048
Architecture = tuple[str, Widths]


@dataclass(frozen=True)
class AccuracyEstimate:
    """What is believed of one architecture.

    Attributes:
        accuracy: Expected accuracy over seeds, in percent.
        sd: Standard deviation of that belief in percent; None where there is no surrogate.
        trainings: How often it was trained to the end.
        dominated: The probability that another trained architecture dominates it: one with no
            more of any cost and a higher accuracy; None where there is no surrogate.
    """

    accuracy: float
    sd: float | None
    trainings: int
    dominated: float | None = None


class AccuracyPosterior:
    """What is believed after some outcomes.

    Args:
        outcomes: All trials of a study.
        spaces: Its spaces by name.
        objectives: Its objectives.
        limits: The least and most of costs that matter: nothing outside is on the front.
    """

    def __init__(
        self,
        outcomes: Sequence[Outcome],
        spaces: Mapping[str, SpaceRecord],
        objectives: Sequence[str],
        limits: Mapping[Any, tuple[float, float]] | None = None,
    ) -> None:
        self.objectives = tuple(objectives)
        self._limits = dict(limits or {})
        self._outcomes = outcomes
        self._spaces = spaces

    @cached_property
    def members(self) -> list[Outcome]:
        """The first finished training of each architecture that has all objectives."""
        first: dict[Architecture, Outcome] = {}
        points = pareto.objective_points(self._outcomes, self.objectives)
        for outcome, point in zip(self._outcomes, points, strict=True):
            if outcome.state == "finished" and not np.isnan(point).any():
                first.setdefault((outcome.space, outcome.widths), outcome)
        return list(first.values())

    @cached_property
    def coordinates(self) -> dict[str, Coordinates]:
        """Of the spaces that were trained, by name."""
        trained = {o.space for o in self._outcomes if o.accuracy is not None}
        names = [name for name in self._spaces if name in trained]
        placed = Coordinates.together([Coordinates.of(self._spaces[name]) for name in names])
        return dict(zip(names, placed, strict=True))

    @cached_property
    def surrogate(self) -> Surrogate | None:
        """Of all spaces that were trained; None where there is too little to learn from."""
        trainings = {name: list[Training]() for name in self.coordinates}
        for o in self._outcomes:
            if o.state != "failed" and o.space in trainings:
                curve = [result.accuracy for result in o.curve]
                trainings[o.space].append(Training(o.widths.vector, o.accuracy, curve))
        every = [training for own in trainings.values() for training in own]
        if sum(training.accuracy is not None for training in every) < ENOUGH:
            return None
        return Surrogate.of_trainings(
            *((self.coordinates[name], own) for name, own in trainings.items())
        )

    def __getitem__(self, outcome: Outcome) -> AccuracyEstimate:
        """What is believed of a finished outcome's architecture."""
        return self._estimates[outcome.space, outcome.widths]

    def accuracy(self, outcome: Outcome) -> float:
        """The believed accuracy of a finished outcome's architecture."""
        return self[outcome].accuracy

    def front(self) -> list[Outcome]:
        """The members that no other dominates by believed accuracy, fewest MACs first."""
        inside = np.flatnonzero([self._is_within(member) for member in self.members])
        kept = inside[pareto.non_dominated(self._points[inside])]
        return sorted((self.members[i] for i in kept), key=lambda o: (o.cost.macs, o.id))

    def _is_within(self, member: Outcome) -> bool:
        return all(
            low <= pareto.objective_value(member, name) <= high
            for name, (low, high) in self._limits.items()
        )

    @property
    def undecided(self) -> list[Outcome]:
        """Members that may or may not be on the front, the least decided first.

        Those whose probability of being dominated is from 5% to 95%.
        """
        open_ = [
            (abs(p - 0.5), member.id, member)
            for member in self.members
            if (p := self[member].dominated) is not None and 0.05 <= p <= 0.95
        ]
        return [member for *_, member in sorted(open_, key=lambda each: each[:2])]

    @cached_property
    def _points(self) -> NDArray[np.float64]:
        """The members as points to minimise, by believed accuracy."""
        points = pareto.objective_points(self.members, self.objectives)
        points[:, self.objectives.index("accuracy")] = [-self.accuracy(o) for o in self.members]
        return points

    @cached_property
    def _estimates(self) -> dict[Architecture, AccuracyEstimate]:
        trained: dict[Architecture, list[float]] = {}
        for o in self._outcomes:
            if o.accuracy is not None:
                trained.setdefault((o.space, o.widths), []).append(o.accuracy)
        estimated = {
            key: AccuracyEstimate(statistics.fmean(accuracies), None, len(accuracies))
            for key, accuracies in trained.items()
        }
        if self.surrogate is None or not self.members:
            return estimated
        grouped = [
            (coordinates, own)
            for name, coordinates in self.coordinates.items()
            if (own := [i for i, member in enumerate(self.members) if member.space == name])
        ]
        seen = [
            Features.of(coordinates, [self.members[i].widths.vector for i in own])
            for coordinates, own in grouped
        ]
        order = np.argsort([i for _, own in grouped for i in own])
        mean, covariance = self.surrogate.joint(reduce(Features.and_, seen).rows(order))
        draws = np.random.default_rng(0).multivariate_normal(
            mean, covariance, _DRAWS, check_valid="ignore", method="eigh"
        )
        costs = np.delete(
            pareto.objective_points(self.members, self.objectives),
            self.objectives.index("accuracy"),
            axis=1,
        )
        for i, member in enumerate(self.members):
            rivals = (costs <= costs[i]).all(axis=1)
            rivals[i] = False
            beaten = (draws[:, rivals] > draws[:, [i]]).any(axis=1).mean()
            sd = float(np.sqrt(covariance[i, i]))
            key = member.space, member.widths
            accuracy = min(float(mean[i]), 100.0)
            estimated[key] = AccuracyEstimate(accuracy, sd, len(trained[key]), float(beaten))
        return estimated
