"""Curves of widths through proposals, solved for a budget: narrower and wider than the base."""

from __future__ import annotations

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from widthsearch.errors import WidthsError
from widthsearch.proposers import Proposal, Setting
from widthsearch.proposers.random import Random
from widthsearch.proposers.uniform import Uniform
from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Widths

Quantity = Literal["macs", "params"]
FamilyName = Literal["linear", "power"]


class Family(ABC):
    """A curve of widths that rise with one parameter τ > 0, snapped to the space's grid.

    On the grid this is a staircase: at certain τ the rounding of an axis moves up one step. Where
    several axes move at the same τ they move one after the other, in the space's order, so that
    neighbours on the curve differ by one step of one axis. A budget is solved exactly.
    """

    space: SearchSpace

    @abstractmethod
    def reaches(self, axis: int, width: Fraction) -> Fraction | float:
        """The τ at which an axis's real width is ``width``; infinite where it never is."""

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """Every member, narrowest first: shape (members, axes)."""
        steps = sorted(
            # nearest() moves up to `reached` where the real width is half a step below it
            (self.reaches(i, Fraction(2 * reached - axis.step, 2)), i)
            for i, axis in enumerate(self.space.axes)
            for reached in axis.grid[1:]
        )
        steps = [(tau, i) for tau, i in steps if tau < math.inf]
        moves = np.zeros((len(steps) + 1, len(self.space.axes)), np.int64)
        moves[0] = [axis.min_width for axis in self.space.axes]
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
        costs = self.space.cost_form(quantity)(self.members)
        last = bisect.bisect_right(costs.tolist(), budget) - 1
        if last < 0:
            raise WidthsError(
                f"a budget of {budget:,.0f} {quantity} is below the narrowest network of space "
                f"{self.space.name!r}, which has {int(costs[0]):,}; raise the budget or lower the "
                "axes' `least`"
            )
        return Widths(self.space.names, tuple(int(w) for w in self.members[last]))


@dataclass(frozen=True, eq=False)
class LinearFamily(Family):
    """All widths ``nearest(τ · profile)``: one proposal, scaled (copycat networks, Crowley et al.
    2018, section 3).

    Attributes:
        space: The space.
        profile: The widths that are scaled.
    """

    space: SearchSpace
    profile: Widths

    def reaches(self, axis: int, width: Fraction) -> Fraction:
        """The τ at which an axis's real width is ``width``; exact."""
        return width / self.profile.vector[axis]


@dataclass(frozen=True, eq=False)
class PowerFamily(Family):
    """All widths ``nearest(α_a τ^β_a)``: a trajectory's own trend, carried on (NeuralScale, Lee and
    Lee, CVPR 2020, equation 4).

    ln w_a = ln α_a + β_a ln τ by least squares along the trajectory, with the members' MACs for τ.
    An axis that the method kept hardly widens along the family, one that it cut early widens most.

    Attributes:
        space: The space.
        alpha: α, shape (axes,).
        beta: β, shape (axes,), at least 0: no axis narrows as the network grows.
    """

    space: SearchSpace
    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]

    @classmethod
    def through(cls, space: SearchSpace, trajectory: Sequence[Widths]) -> PowerFamily:
        """The family of a trajectory of two members or more with different MACs."""
        vectors = np.array([widths.vector for widths in trajectory])
        tau, logs = np.log(space.macs(vectors)), np.log(vectors)
        away = tau - tau.mean()
        beta = np.maximum(away @ logs / (away @ away), 0.0)
        return cls(space, np.exp(logs.mean(0) - beta * tau.mean()), beta)

    def reaches(self, axis: int, width: Fraction) -> float:
        """The τ (MACs of the trend) at which an axis's real width is ``width``."""
        ratio, beta = float(width) / self.alpha[axis], self.beta[axis]
        if beta > 0:
            with np.errstate(over="ignore"):
                return float(np.float64(ratio) ** (1 / beta))
        return 0.0 if ratio <= 1 else math.inf


def along(
    space: SearchSpace, proposal: Proposal, budget: float, family: FamilyName = "linear"
) -> Widths:
    """The member of a proposal's families that meets a MACs budget from below.

    ``linear``: the trajectory's member nearest to the budget (in log MACs) gives the profile, and
    its linear family the rest of the way; beyond the ends of the trajectory that widens or narrows
    it. ``power``: the power-law family through the whole trajectory (linear, where that has one
    member).

    Raises:
        WidthsError: The budget is below the narrowest network of the space.
    """
    macs = space.macs(np.array([widths.vector for widths in proposal.trajectory]))
    if family == "power" and len(set(macs.tolist())) > 1:
        return PowerFamily.through(space, proposal.trajectory).solve(budget)
    nearest = int(np.argmin(np.abs(np.log(macs / budget))))
    return LinearFamily(space, proposal.trajectory[nearest]).solve(budget)


def mixed(space: SearchSpace, first: Widths, second: Widths, budget: float) -> Widths:
    """Two proposals' mixture at a MACs budget: the linear family of their geometric mean.

    Raises:
        WidthsError: The budget is below the narrowest network of the space.
    """
    mean = np.sqrt(np.array(first.vector, np.float64) * np.array(second.vector))
    return LinearFamily(space, space.nearest(mean)).solve(budget)


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
    families: Sequence[FamilyName | Literal["mixture"]] = ("linear",),
) -> list[Candidate]:
    """Every proposal at every budget in every family, without repeats.

    Args:
        spaces: The spaces by name.
        proposals: What the proposers returned, by space.
        budgets: Shares of the first space's base's MACs.
        families: Which; ``mixture`` is that of each two proposals' linear members.

    Returns:
        Candidates whose origin is ``{"proposer", "family", "budget"}``.

    Raises:
        WidthsError: A budget is below the narrowest network of every space.
    """
    out: dict[tuple[str, Widths], Candidate] = {}

    def add(space: SearchSpace, widths: Widths, proposer: str, family: str, budget: float) -> None:
        origin = {"proposer": proposer, "family": family, "budget": budget}
        out.setdefault((space.name, widths), Candidate(space.name, widths, origin))

    for budget in budgets:
        for space, macs in _within(spaces, budget):
            own = proposals.get(space.name, ())
            for family in families:
                if family != "mixture":
                    for proposal in own:
                        widths = along(space, proposal, macs, family)
                        add(space, widths, proposal.method, family, budget)
                    continue
                for a, b in itertools.combinations(own, 2):
                    widths = mixed(space, along(space, a, macs), along(space, b, macs), macs)
                    add(space, widths, f"{a.method}+{b.method}", family, budget)
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
        ends = [[axis.min_width for axis in space.axes], [axis.max_width for axis in space.axes]]
        narrowest, widest = space.macs(ends)
        if narrowest <= macs and (macs <= widest or space is first):
            found.append((space, macs))
    if not found:
        LinearFamily(first, first.base).solve(macs)  # says why
    return found
