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
from widthsearch.proposers import Proposal, Random, Setting, Uniform
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


@dataclass(frozen=True)
class Candidate:
    """Widths that are worth a training.

    Attributes:
        space: The name of their space.
        widths: The architecture.
        origin: Where they came from, as plain JSON values.
    """

    space: str
    widths: Widths
    origin: Mapping[str, object]


def candidates(
    spaces: Mapping[str, SearchSpace],
    proposals: Mapping[str, Sequence[Proposal]],
    budgets: Sequence[float],
) -> list[Candidate]:
    """Every proposal at every budget, without repeats.

    Args:
        spaces: The spaces by name.
        proposals: What the proposers returned, by space.
        budgets: Shares of the first space's base's MACs.

    Returns:
        Candidates whose origin is ``{"proposer", "family", "budget"}``.

    Raises:
        WidthsError: A budget is below the narrowest network of every space.
    """
    out: dict[tuple[str, Widths], Candidate] = {}
    for budget in budgets:
        for space, macs in _within(spaces, budget):
            for proposal in proposals[space.name]:
                widths = along(space, proposal, macs)
                origin = {"proposer": proposal.method, "family": "linear", "budget": budget}
                out.setdefault((space.name, widths), Candidate(space.name, widths, origin))
    return list(out.values())


def baselines(
    spaces: Mapping[str, SearchSpace], budgets: Sequence[float], count: int, seed: int
) -> list[Candidate]:
    """What every search is compared with, at the same budgets: uniform widths, then random ones.

    With several spaces the uniform ones are the grid of depth × width. Where ``count`` is less than
    there are of those, they are spread evenly over the grid.

    Args:
        spaces: The spaces by name.
        budgets: Shares of the first space's base's MACs.
        count: How many; fewer where widths repeat.
        seed: Of the random widths.

    Returns:
        Candidates whose origin is that of :func:`candidates`, and ``"baseline": True``.
    """
    places = [(budget, *place) for budget in budgets for place in _within(spaces, budget)]
    if count < len(places):
        spread = np.linspace(0, len(places) - 1, count).round().astype(int)
        places = [places[i] for i in spread]
    out: dict[tuple[str, Widths], Candidate] = {}
    for turn in range(count):  # the first is uniform; each gives one at least, or widths repeat
        for i, (budget, space, macs) in enumerate(places):
            if len(out) == count:
                break
            own = int(np.random.SeedSequence((seed, turn, i)).generate_state(1)[0])
            method = Random() if turn else Uniform()
            proposal = method(space, None, Setting(own))  # type: ignore[arg-type]  # reads no data
            origin = {
                "proposer": proposal.method,
                "family": "linear",
                "budget": budget,
                "baseline": True,
            }
            widths = along(space, proposal, macs)
            out.setdefault((space.name, widths), Candidate(space.name, widths, origin))
    return list(out.values())


def _within(spaces: Mapping[str, SearchSpace], budget: float) -> list[tuple[SearchSpace, float]]:
    """The spaces that have a network of a budget, with the budget in MACs.

    The first one always takes part, up to its widest network.
    """
    first = next(iter(spaces.values()))
    macs = budget * first.cost(first.base).macs
    found = []
    for space in spaces.values():
        ends = [[axis.least for axis in space.axes], [axis.most for axis in space.axes]]
        narrowest, widest = space.macs(ends)
        if narrowest <= macs and (macs <= widest or space is first):
            found.append((space, macs))
    if not found:
        LinearFamily(first, first.base).solve(macs)  # says why
    return found
