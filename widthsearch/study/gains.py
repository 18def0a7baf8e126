"""The gain of a search over the best of its baselines, at equal cost.

The baselines look at nothing (:mod:`widthsearch.proposers.baselines`): what a search gains over
the best of them is its own worth, beyond the arithmetic of costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from widthsearch.bayesopt.pareto import non_dominated
from widthsearch.proposers import BASELINES
from widthsearch.study.front import cost_value, equal_cost_pairs
from widthsearch.study.posterior import INTERVAL, MetricPosterior
from widthsearch.study.trial import Trial


def is_baseline(origin: Mapping[str, Any]) -> bool:
    """Whether widths are a baseline: a base, or of a method that looks at nothing."""
    return bool(origin.get("base")) or origin.get("proposer") in BASELINES


def baselines(posterior: MetricPosterior) -> list[Trial]:
    """The members that are baselines and within the limits, fewest MACs first."""
    inside = (t for t in posterior.members_within_limits if is_baseline(t.origin))
    return sorted(inside, key=lambda t: (t.cost.macs, t.number))


def best_baselines(posterior: MetricPosterior, *costs: str) -> list[Trial]:
    """The baselines that no other baseline dominates by estimated value and some costs."""
    found = baselines(posterior)
    points = [[-posterior.goodness(t), *(cost_value(t, name) for name in costs)] for t in found]
    kept = non_dominated(np.array(points).reshape(len(found), 1 + len(costs)))
    return [t for t, on in zip(found, kept, strict=True) if on]


@dataclass(frozen=True)
class Gain:
    """The mean gain of all other networks over the best baselines at equal cost.

    Attributes:
        cost: The cost.
        mean: The mean difference of estimated values, above 0 where the other networks are better.
        sd: Its standard deviation under the joint posterior.
        pairs: The number of baselines that some other network costs no more than.
        rivals: The number of baselines on the front of all baselines.

    Example:
        >>> Gain("macs", mean=0.5, sd=0.1, pairs=4, rivals=5).to_json()["interval"]
        [0.3355, 0.6645]
    """

    cost: str
    mean: float
    sd: float
    pairs: int
    rivals: int

    @property
    def half_width(self) -> float:
        """Half the width of the 90% interval."""
        return INTERVAL * self.sd

    def to_json(self) -> dict[str, Any]:
        """The attributes, with the 90% interval in place of the standard deviation."""
        ends = [self.mean - self.half_width, self.mean + self.half_width]
        return {**asdict(self), "sd": self.sd, "interval": ends}


def gains(posterior: MetricPosterior) -> list[Gain]:
    """The gain at equal cost for each cost among the objectives; none without a surrogate.

    The rivals are the best baselines: those that no other baseline dominates by estimated value and
    this cost. Each is paired with the best of the networks that are no baselines and cost no more.
    """
    if posterior.surrogate is None:
        return []
    found = [t for t in posterior.members_within_limits if not is_baseline(t.origin)]
    out = []
    for cost in (name for name in posterior.objectives if name != posterior.metric.name):
        rivals = best_baselines(posterior, cost)
        if pairs := equal_cost_pairs(found, rivals, cost, posterior.goodness):
            mean, sd = posterior.mean_difference(pairs)
            out.append(Gain(cost, mean, sd, len(pairs), len(rivals)))
    return out
