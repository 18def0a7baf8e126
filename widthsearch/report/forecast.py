"""Forecast of each proposal's families at every size, by the surrogate of a study.

A proposal is a shape; its families scale that shape to any budget, narrower and wider than the
base. Once some networks are trained, the surrogate estimates the metric of each member, and so
which shape deserves the next training, and at which size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtr

from widthsearch.errors import StudyError
from widthsearch.proposers import Setting, families
from widthsearch.proposers.uniform import Uniform
from widthsearch.space.cost import Cost
from widthsearch.study.front import is_within_limits
from widthsearch.study.posterior import ENOUGH, Estimate, MetricPosterior
from widthsearch.study.proposals import stored_proposals
from widthsearch.study.storage import Store
from widthsearch.widths import Widths

if TYPE_CHECKING:
    from widthsearch.api import Study

BUDGETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Shares of the base's MACs."""


@dataclass(frozen=True)
class Forecast:
    """The forecast of one member of a family.

    Attributes:
        space: Its space's name.
        widths: Its architecture.
        origin: The proposer, the family, and the budget as a share of the base's MACs.
        cost: Its exact cost.
        estimate: The posterior of its value, with the number of its finished trainings.
        beats_front: The probability that its score is above that of every trained network within
            the limits with no more MACs (or, where there is none, of the worst network).
        gain: The expected lead over them in the metric's unit, a negative lead counting as 0
            (expected improvement: Jones, Schonlau and Welch, 1998, equation 15, of the score, times
            the slope of the value there); at most up to the end of the metric's range.
        extrapolated: Whether it lies outside the trained sizes: its MACs outside the range of its
            space's finished trials, or a width more than one step outside of its axis's range
            there. The surrogate's trend is not to be trusted there.
        within_limits: Whether its exact costs are within the study's limits.

    Example:
        >>> from widthsearch.space.cost import Cost
        >>> forecast = Forecast(
        ...     "net",
        ...     Widths(("conv1",), (8,)),
        ...     {"proposer": "uniform", "family": "linear", "budget": 0.5},
        ...     Cost(macs=900, params=80, activations=64),
        ...     Estimate(91.0, sd=0.5, trainings=0),
        ...     beats_front=0.25,
        ...     gain=0.1,
        ...     extrapolated=False,
        ...     within_limits=True,
        ... )
        >>> forecast.trained, forecast.to_json()["estimated"]["interval"]
        (False, (90.1775, 91.8225))
    """

    space: str
    widths: Widths
    origin: Mapping[str, Any]
    cost: Cost
    estimate: Estimate
    beats_front: float
    gain: float
    extrapolated: bool
    within_limits: bool

    @property
    def trained(self) -> bool:
        """Whether it was trained to the end."""
        return self.estimate.trainings > 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "space": self.space,
            "widths": self.widths.to_json(),
            "origin": dict(self.origin),
            "macs": self.cost.macs,
            "params": self.cost.params,
            "estimated": self.estimate.to_json(),
            "beats_front": self.beats_front,
            "gain": self.gain,
            "extrapolated": self.extrapolated,
            "within_limits": self.within_limits,
        }


def forecast(
    study: Study, posterior: MetricPosterior, budgets: Sequence[float] = BUDGETS
) -> list[Forecast]:
    """The members of the families of the study's proposals and uniform widths at each budget.

    The best next training is the one of the greatest :attr:`Forecast.gain` among those within the
    limits that are neither trained nor extrapolated.

    Args:
        study: A study that was run; its spaces' code is needed.
        posterior: Its posterior.
        budgets: Shares of the first space's base's MACs; those below every network are left out.

    Raises:
        StudyError: The study has too few finished trials for a surrogate.
    """
    surrogate = posterior.surrogate
    if surrogate is None:
        raise StudyError(
            f"a forecast needs {ENOUGH} finished trials, but study {study.config.name!r} has "
            f"{len(posterior.members)}: run it with more `trials`"
        )
    spaces, config = study.spaces, study.config
    found = stored_proposals(
        Store.open(study.storage, config.name), config.proposers, spaces.values()
    )
    for name, space in spaces.items():
        uniform = Uniform()(space, None, Setting())
        if not any(proposal.method == uniform.method for proposal in found[name]):
            found[name].append(uniform)
    metric = posterior.metric
    known = [(t.cost.macs, posterior.score(t)) for t in posterior.members_within_limits]
    least = min(map(posterior.score, posterior.members))
    utmost = metric.ends[metric.goal == "maximize"]
    out = []
    base = study.space.cost(study.space.base).macs
    narrowest = min(s.cost([axis.min_width for axis in s.axes]).macs for s in spaces.values())
    met = [budget for budget in budgets if budget * base >= narrowest]
    for candidate in families.family_candidates(spaces, found, met, config.families):
        space = spaces[candidate.space]
        own = [member for member in posterior.members if member.space == candidate.space]
        if not own:
            continue
        cost = space.cost(candidate.widths)
        estimate = surrogate.of_space(posterior.coordinates[candidate.space]).posterior(
            [candidate.widths.vector]
        )
        value, sd = float(metric.value(estimate.mean[0])), float(estimate.sd[0])
        mean = float(metric.score(value))
        best = max((score for macs, score in known if macs <= cost.macs), default=least)
        ahead = (mean - best) / sd
        density = np.exp(-(ahead**2) / 2) / np.sqrt(2 * np.pi)
        gain = sd * (density + ahead * ndtr(ahead)) * metric.slope(best)
        room = abs(utmost - float(metric.value(best)))
        trained = [posterior[member] for member in own if member.widths == candidate.widths]
        seen = np.array([member.widths.vector for member in own])
        steps = [axis.step for axis in space.axes]
        vector = np.array(candidate.widths.vector)
        outside = (vector < seen.min(0) - steps) | (vector > seen.max(0) + steps)
        macs = [member.cost.macs for member in own]
        out.append(
            Forecast(
                candidate.space,
                candidate.widths,
                candidate.origin,
                cost,
                Estimate(value, sd, sum(t.trainings for t in trained), metric=metric),
                float(ndtr(ahead)),
                min(float(gain), room),
                bool(outside.any()) or not min(macs) <= cost.macs <= max(macs),
                is_within_limits(cost, config.limits),
            )
        )
    return out
