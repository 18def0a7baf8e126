"""What is believed of networks that were trained: their accuracy, and who is on the front.

One training's accuracy is luck as much as merit: seed noise is as large as the differences that
matter, so the raw best is a winner's curse. The surrogate has learned the noise and what like
networks reached; the front is drawn by what it believes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from widthsearch import pareto
from widthsearch.outcomes import Outcome
from widthsearch.storage import SpaceRecord
from widthsearch.surrogate import Coordinates, Surrogate
from widthsearch.widths import Widths

ENOUGH = 8
"""Finished trainings of a space before its surrogate is asked; with fewer, means stand for it."""

INTERVAL = 1.645
"""Standard deviations to each side that hold 90% of a normal distribution."""

_DRAWS = 2048
Architecture = tuple[str, Widths]


@dataclass(frozen=True)
class Belief:
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


class Beliefs:
    """What is believed after some outcomes.

    Args:
        outcomes: All trials of a study.
        spaces: Its spaces by name.
        objectives: Its objectives.
    """

    def __init__(
        self,
        outcomes: Sequence[Outcome],
        spaces: Mapping[str, SpaceRecord],
        objectives: Sequence[str],
    ) -> None:
        self.objectives = tuple(objectives)
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
    def surrogates(self) -> dict[str, Surrogate]:
        """By space, where there is enough to learn from."""
        found = {}
        for name, record in self._spaces.items():
            own = [o for o in self._outcomes if o.space == name and o.state != "failed"]
            if sum(o.accuracy is not None for o in own) >= ENOUGH:
                costs = {"macs": record.macs, "params": record.params}
                found[name] = Surrogate.of_trainings(
                    Coordinates(record.axes, costs),
                    [o.widths.vector for o in own],
                    [o.accuracy for o in own],
                    [[result.accuracy for result in o.curve] for o in own],
                )
        return found

    def __getitem__(self, outcome: Outcome) -> Belief:
        """What is believed of a finished outcome's architecture."""
        return self._beliefs[outcome.space, outcome.widths]

    def accuracy(self, outcome: Outcome) -> float:
        """The believed accuracy of a finished outcome's architecture."""
        return self[outcome].accuracy

    def front(self) -> list[Outcome]:
        """The members that no other dominates by believed accuracy, fewest MACs first."""
        if not self.members:
            return []
        kept = pareto.non_dominated(self._points)
        members = [member for member, keep in zip(self.members, kept, strict=True) if keep]
        return sorted(members, key=lambda o: (o.cost.macs, o.id))

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

    @property
    def coverage(self) -> tuple[float, int] | None:
        """The share of trainings inside their 90% intervals when left out, and of how many."""
        shares = [(s.coverage(0.9), s.size) for s in self.surrogates.values()]
        count = sum(n for _, n in shares)
        return (sum(share * n for share, n in shares) / count, count) if count else None

    @cached_property
    def _points(self) -> NDArray[np.float64]:
        """The members as points to minimise, by believed accuracy."""
        points = pareto.objective_points(self.members, self.objectives)
        points[:, self.objectives.index("accuracy")] = [-self.accuracy(o) for o in self.members]
        return points

    @cached_property
    def _beliefs(self) -> dict[Architecture, Belief]:
        trained: dict[Architecture, list[float]] = {}
        for o in self._outcomes:
            if o.accuracy is not None:
                trained.setdefault((o.space, o.widths), []).append(o.accuracy)
        believed = {
            key: Belief(statistics.fmean(accuracies), None, len(accuracies))
            for key, accuracies in trained.items()
        }
        draws = np.empty((_DRAWS, len(self.members)))
        rng = np.random.default_rng(0)
        for space in {member.space for member in self.members}:
            own = [i for i, member in enumerate(self.members) if member.space == space]
            keys = [(space, self.members[i].widths) for i in own]
            surrogate = self.surrogates.get(space)
            if surrogate is None:
                draws[:, own] = [believed[key].accuracy for key in keys]
                continue
            mean, covariance = surrogate.joint([widths.vector for _, widths in keys])
            draws[:, own] = rng.multivariate_normal(
                mean, covariance, _DRAWS, check_valid="ignore", method="eigh"
            )
            for key, m, variance in zip(keys, mean, np.diag(covariance), strict=True):
                sd = float(np.sqrt(variance))
                believed[key] = Belief(float(m), sd, len(trained[key]))
        costs = np.delete(
            pareto.objective_points(self.members, self.objectives),
            self.objectives.index("accuracy"),
            axis=1,
        )
        for i, member in enumerate(self.members):
            key = member.space, member.widths
            if believed[key].sd is None:
                continue
            rivals = (costs <= costs[i]).all(axis=1)
            rivals[i] = False
            beaten = (draws[:, rivals] > draws[:, [i]]).any(axis=1).mean()
            belief = believed[key]
            believed[key] = Belief(belief.accuracy, belief.sd, belief.trainings, float(beaten))
        return believed
