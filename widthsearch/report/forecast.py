"""What proposals promise at every size: their families, as the surrogate believes them.

A proposal is a shape; its families carry that shape to any budget, narrower and wider than the
base. After some trainings the surrogate says how accurate each member would be, and so which shape
deserves the next training, and at which size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

from widthsearch.api import Study
from widthsearch.errors import StudyError
from widthsearch.proposers import Setting, families
from widthsearch.proposers.uniform import Uniform
from widthsearch.space.cost import Cost
from widthsearch.study.proposals import stored_proposals
from widthsearch.study.storage import Store
from widthsearch.widths import Widths

BUDGETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Shares of the base's MACs."""


@dataclass(frozen=True)
class Forecast:
    """What is believed of a member of a family.

    Attributes:
        space: Its space's name.
        widths: Its architecture.
        origin: The proposer, the family, and the budget as a share of the base's MACs.
        cost: Its exact cost.
        accuracy: Expected accuracy over seeds, in percent.
        sd: Standard deviation of that belief, in percent.
        beats_front: The probability that it is more accurate than all trained networks with no more
            MACs (where there is none, than the least accurate of all).
        gain: By how many points it is expected to be so; being worse counts as 0 (expected
            improvement: Jones, Schonlau and Welch, 1998, equation 15).
        trained: Whether it was trained to the end.
    """

    space: str
    widths: Widths
    origin: Mapping[str, Any]
    cost: Cost
    accuracy: float
    sd: float
    beats_front: float
    gain: float
    trained: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "space": self.space,
            "widths": self.widths.to_json(),
            "origin": dict(self.origin),
            "macs": self.cost.macs,
            "params": self.cost.params,
            "accuracy": self.accuracy,
            "sd": self.sd,
            "beats_front": self.beats_front,
            "gain": self.gain,
            "trained": self.trained,
        }


def forecast(study: Study, budgets: Sequence[float] = BUDGETS) -> list[Forecast]:
    """The study's proposals and uniform widths, in its families, at each budget.

    Where to train next is where :attr:`Expected.gain` is greatest among those that are not trained.

    Args:
        study: A study that was run; its spaces' code is needed.
        budgets: Shares of the first space's base's MACs; what no network meets is left out.

    Raises:
        StudyError: The study was never run, or too little is trained to believe anything.
    """
    posterior = study.posterior()
    surrogate = posterior.surrogate
    if surrogate is None:
        raise StudyError(
            f"study {study.config.name!r} has too few finished trainings to foretell others: run it"
        )
    spaces, config = study.spaces, study.config
    found = stored_proposals(
        Store.open(study.storage, config.name), config.proposers, spaces.values()
    )
    for name, space in spaces.items():
        uniform = Uniform()(space, None, Setting())  # type: ignore[arg-type]  # reads no data
        if not any(proposal.method == uniform.method for proposal in found[name]):
            found[name].append(uniform)
    trained = {(member.space, member.widths) for member in posterior.members}
    known = [(member.cost.macs, posterior.accuracy(member)) for member in posterior.members]
    least = min(accuracy for _, accuracy in known)
    out = []
    base = study.space.cost(study.space.base).macs
    narrowest = min(s.cost([axis.min_width for axis in s.axes]).macs for s in spaces.values())
    met = [budget for budget in budgets if budget * base >= narrowest]
    for candidate in families.family_candidates(spaces, found, met, config.families):
        cost = spaces[candidate.space].cost(candidate.widths)
        if candidate.space not in posterior.coordinates:  # nothing of it is trained
            continue
        estimate = surrogate.of_space(posterior.coordinates[candidate.space]).posterior(
            [candidate.widths.vector]
        )
        mean, sd = min(float(estimate.mean[0]), 100.0), float(estimate.sd[0])
        best = max((accuracy for macs, accuracy in known if macs <= cost.macs), default=least)
        ahead = (mean - best) / sd
        density = np.exp(-(ahead**2) / 2) / np.sqrt(2 * np.pi)
        out.append(
            Forecast(
                candidate.space,
                candidate.widths,
                candidate.origin,
                cost,
                mean,
                sd,
                float(ndtr(ahead)),
                float(sd * (density + ahead * ndtr(ahead))),
                (candidate.space, candidate.widths) in trained,
            )
        )
    return out
