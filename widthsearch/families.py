"""Curves of widths through proposals, solved for a budget: narrower and wider than the base."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from widthsearch.errors import WidthsError
from widthsearch.proposers import Proposal
from widthsearch.space import SearchSpace
from widthsearch.widths import Widths

Quantity = Literal["macs", "params"]


@dataclass(frozen=True, eq=False)
class LinearFamily:
    """All widths ``nearest(τ · profile)``, τ > 0: one proposal, scaled (copycat networks,
    Crowley et al. 2018, section 3).

    On the grid this is a staircase: at certain τ the rounding of an axis moves up one step. Where
    several axes move at the same τ they move one after the other, in the space's order, so that
    neighbours on the curve differ by one step of one axis. A budget is solved exactly.

    Attributes:
        space: The space.
        profile: The widths that are scaled.
    """

    space: SearchSpace
    profile: Widths

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """Every member, narrowest first: shape (members, axes)."""
        steps = sorted(
            # nearest() moves up to `reached` where τ·width is half a step below it
            (Fraction(2 * reached - axis.step, 2 * width), i)
            for i, (axis, width) in enumerate(
                zip(self.space.axes, self.profile.vector, strict=True)
            )
            for reached in axis.grid[1:]
        )
        moves = np.zeros((len(steps) + 1, len(self.space.axes)), np.int64)
        moves[0] = [axis.least for axis in self.space.axes]
        for row, (_, i) in enumerate(steps, start=1):
            moves[row, i] = self.space.axes[i].step
        return moves.cumsum(0)

    def solve(self, budget: float, quantity: Quantity = "macs") -> Widths:
        """The widest member that costs at most ``budget``.

        Args:
            budget: In MACs or parameters.
            quantity: Which of the two.

        Raises:
            WidthsError: Even the narrowest member costs more.
        """
        costs = self.space.form(quantity)(self.members)
        last = bisect.bisect_right(costs.tolist(), budget) - 1
        if last < 0:
            raise WidthsError(
                f"a budget of {budget:,.0f} {quantity} is below the narrowest network of space "
                f"{self.space.name!r}, which has {int(costs[0]):,}; raise the budget or lower the "
                "axes' `least`"
            )
        return Widths(self.space.names, tuple(int(w) for w in self.members[last]))


def along(space: SearchSpace, proposal: Proposal, budget: float) -> Widths:
    """The member of a proposal's families that meets a MACs budget from below.

    The trajectory's member nearest to the budget (in log MACs) gives the profile, and its linear
    family the rest of the way; beyond the ends of the trajectory that widens or narrows it.

    Raises:
        WidthsError: The budget is below the narrowest network of the space.
    """
    macs = space.macs(np.array([widths.vector for widths in proposal.trajectory]))
    nearest = int(np.argmin(np.abs(np.log(macs / budget))))
    return LinearFamily(space, proposal.trajectory[nearest]).solve(budget)


def candidates(
    space: SearchSpace, proposals: Sequence[Proposal], budgets: Sequence[float]
) -> list[tuple[Widths, Mapping[str, object]]]:
    """Every proposal at every budget, without repeats, the uniform baseline first.

    Args:
        space: The space.
        proposals: What the proposers returned.
        budgets: Shares of the base's MACs.

    Returns:
        Widths with their origin: ``{"proposer", "family", "budget"}``.

    Raises:
        WidthsError: A budget is below the narrowest network of the space.
    """
    base = space.cost(space.base).macs
    out: dict[Widths, Mapping[str, object]] = {}
    # Where two agree, the baseline keeps its member: comparisons need it whole.
    baseline_first = sorted(proposals, key=lambda proposal: proposal.method != "uniform")
    for budget in budgets:
        for proposal in baseline_first:
            widths = along(space, proposal, budget * base)
            origin = {"proposer": proposal.method, "family": "linear", "budget": budget}
            out.setdefault(widths, origin)
    return list(out.items())
