"""Families: curves of widths through a proposal, solved for budgets below or above the base's cost.

Notation::

    a       an axis; w_a its width, b_a the width of a proposal's profile
    τ > 0   the parameter of a family; every width rises with τ
    F(w)    the MACs of widths w

A linear family is w_a = nearest(τ b_a), a power family w_a = nearest(α_a τ^β_a), where ``nearest``
rounds to the grid of the axis. On the grid both are staircases. For example, let two axes have the
grid 2, 4, 6, 8 and the profile (4, 8). The first axis, 4τ, rounds up from 2 to 4 at τ = 3/4, where
4τ = 3 lies halfway between; the second axis, 8τ, rounds up from 2 to 4 at τ = 3/8, from 4 to 6 at
5/8 and from 6 to 8 at 7/8. Sorted by τ, the members of the family are (2, 2), (2, 4), (2, 6),
(4, 6), (4, 8), (6, 8), (8, 8). F rises along them, so that bisection finds the widest member
within a budget.

The profile of a ``linear`` family is the trajectory's member nearest to the budget, that of a
``copycat`` the member nearest to a quarter of the base's MACs, at all budgets. A trajectory begins
at the base, which has no shape of the method's own: at and above the base's MACs a linear family is
the copycat.
"""

from __future__ import annotations

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from widthsearch.errors import WidthsError
from widthsearch.proposers.protocol import Proposal
from widthsearch.widths import Widths

if TYPE_CHECKING:
    from widthsearch.space.search_space import SearchSpace

FamilyName = Literal["linear", "power", "copycat"]

COPYCAT = 0.25
"""The share of the base's MACs at which a trajectory's member is the profile of a copycat."""


class Family(ABC):
    """A curve of widths that rise with one parameter τ > 0, rounded to the space's grid.

    Each member differs from the next one by one grid step of one axis. Where several axes round up
    at the same τ, they do so one after the other, in the order of the space.

    Attributes:
        space: The space.

    Example:
        >>> from types import SimpleNamespace
        >>> from widthsearch.widths import Axis
        >>> class Diagonal(Family):
        ...     def tau_at(self, axis, width):
        ...         return width
        >>> family = Diagonal()
        >>> family.space = SimpleNamespace(axes=[Axis("a", 4, 2, 4, 2), Axis("b", 8, 4, 8, 2)])
        >>> family.members.tolist()
        [[2, 4], [4, 4], [4, 6], [4, 8]]
    """

    space: SearchSpace

    @abstractmethod
    def tau_at(self, axis: int, width: Fraction) -> Fraction | float:
        """The τ at which the axis has this width before rounding; infinite if it never has."""

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """All members, narrowest first: widths of shape (members, axes)."""
        axes = self.space.axes
        steps = sorted(
            # nearest() rounds up to `width` from half a step below it.
            (self.tau_at(i, Fraction(2 * width - axis.step, 2)), i)
            for i, axis in enumerate(axes)
            for width in axis.grid[1:]
        )
        moved = [i for tau, i in steps if tau < math.inf]
        moves = np.diag([axis.step for axis in axes])[moved]
        return np.vstack([[axis.min_width for axis in axes], moves]).cumsum(0, dtype=np.int64)

    def solve(self, budget: float) -> Widths:
        """The widest member within a budget of MACs.

        Raises:
            WidthsError: Even the narrowest member exceeds the budget.
        """
        costs = self.space.macs(self.members)
        last = bisect.bisect_right(costs.tolist(), budget) - 1
        if last < 0:
            raise WidthsError(
                f"a budget of {budget:,.0f} MACs is below the narrowest network of space "
                f"{self.space.name!r}, which has {int(costs[0]):,}; raise the budget, or lower "
                "the smallest widths of the axes"
            )
        return Widths(self.space.names, tuple(int(w) for w in self.members[last]))


@dataclass(frozen=True, eq=False)
class LinearFamily(Family):
    """Scaled widths, w_a = nearest(τ b_a): as the "copycat" networks of Crowley et al. 2018 (arXiv
    1810.04622), section 3, which scale one pruned network.

    Attributes:
        space: The space.
        profile: The widths b that are scaled.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 2))
        >>> space = SearchSpace.from_model(net, (4,), step=2)
        >>> space.cost(space.base).macs  # 4 · 8 + 8 · 16 + 16 · 2
        192
        >>> family = LinearFamily(space, space.base)
        >>> family.solve(70).vector, family.solve(500).vector
        ((4, 8), (14, 26))
    """

    space: SearchSpace
    profile: Widths

    def tau_at(self, axis: int, width: Fraction) -> Fraction:
        """The τ at which the axis has this width before rounding; exact."""
        return width / self.profile.vector[axis]


@dataclass(frozen=True, eq=False)
class PowerFamily(Family):
    """The trend of a trajectory, w_a = nearest(α_a τ^β_a): NeuralScale (Lee and Lee, CVPR 2020),
    equation 4.

    ``ln w_a = ln α_a + β_a ln τ`` is fitted by least squares to the members of the trajectory, with
    τ = F(w), each axis up to the member where it first has its smallest width: what follows is
    the grid's end, not the method's trend. An axis that the method kept wide hardly widens along
    the family; one that it pruned early widens most.

    Attributes:
        space: The space.
        log_alpha: ln α, shape (axes,); α itself may be too small for a float where β is large.
        beta: β, shape (axes,), at least 0: no axis narrows as the network grows.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 2))
        >>> space = SearchSpace.from_model(net, (4,), step=2)
        >>> family = PowerFamily.fit(space, [space.base, space.widths([8, 4])])
        >>> family.solve(120).vector, family.solve(250).vector  # the first axis was kept
        ((8, 8), (8, 20))
    """

    space: SearchSpace
    log_alpha: NDArray[np.float64]
    beta: NDArray[np.float64]

    @classmethod
    def fit(cls, space: SearchSpace, trajectory: Sequence[Widths]) -> PowerFamily:
        """Fit a trajectory that has members of at least two different MACs."""
        vectors = np.array([widths.vector for widths in trajectory])
        tau, logs = np.log(space.macs(vectors)), np.log(vectors)
        log_alpha, beta = np.zeros((2, len(space.axes)))
        for i, axis in enumerate(space.axes):
            clipped = np.flatnonzero(vectors[:, i] <= axis.min_width)
            end = clipped[0] + 1 if len(clipped) else len(vectors)
            away = tau[:end] - tau[:end].mean()
            if away.any():
                beta[i] = max(0.0, away @ logs[:end, i] / (away @ away))
            log_alpha[i] = logs[:end, i].mean() - beta[i] * tau[:end].mean()
        return cls(space, log_alpha, beta)

    def tau_at(self, axis: int, width: Fraction) -> float:
        """The τ, in MACs, at which the axis has this width before rounding."""
        log_ratio, beta = math.log(width) - self.log_alpha[axis], self.beta[axis]
        if beta > 0:
            with np.errstate(over="ignore"):
                return float(np.exp(log_ratio / beta))
        return 0.0 if log_ratio <= 0 else math.inf


def scale_proposal(
    space: SearchSpace, proposal: Proposal, budget: float, family: FamilyName = "linear"
) -> Widths:
    """Scale a proposal to a MACs budget, from below.

    Args:
        space: The space.
        proposal: A proposal of the space.
        budget: The most MACs.
        family: ``linear`` scales the member of the trajectory nearest to the budget in log MACs, or
            at and above the base's MACs that of ``copycat``: the member nearest to a quarter of the
            base's. ``power`` follows the trend of the whole trajectory. A trajectory whose members
            all cost the same has no trend and is scaled linearly. A proposal that has a
            :attr:`~widthsearch.proposers.protocol.Proposal.profile` is scaled by it in all three.

    Raises:
        WidthsError: The budget is below the narrowest network of the space.
    """
    if proposal.profile is not None:
        return LinearFamily(space, proposal.profile).solve(budget)
    macs = space.macs(np.array([widths.vector for widths in proposal.trajectory]))
    if family == "power" and len(set(macs.tolist())) > 1:
        return PowerFamily.fit(space, proposal.trajectory).solve(budget)
    base = space.cost(space.base).macs
    wanted = COPYCAT * base if family == "copycat" or budget >= base else budget
    nearest = int(np.argmin(np.abs(np.log(macs / wanted))))
    return LinearFamily(space, proposal.trajectory[nearest]).solve(budget)


def lowest_share(
    budgets: Sequence[float], families: Sequence[FamilyName | Literal["mixture"]]
) -> float:
    """The share of the base's MACs down to which a trajectory is scaled into these families.

    Example:
        >>> lowest_share([0.5, 0.75], ["linear"]), lowest_share([0.5, 1.0], ["linear"])
        (0.5, 0.25)
    """
    copied = "copycat" in families or max(budgets) >= 1
    return min(*budgets, COPYCAT) if copied else min(budgets)


def mix_proposals(space: SearchSpace, pair: tuple[Proposal, Proposal], budget: float) -> Widths:
    """Scale two proposals to a MACs budget, and their geometric mean as well, from below.

    Raises:
        WidthsError: The budget is below the narrowest network of the space.
    """
    first, second = (np.array(scale_proposal(space, each, budget).vector) for each in pair)
    mean = np.sqrt(first.astype(np.float64) * second)
    return LinearFamily(space, space.nearest(mean)).solve(budget)


@dataclass(frozen=True)
class Candidate:
    """Widths to train.

    Attributes:
        space: The name of the space.
        widths: The architecture.
        origin: The method that produced the widths and its settings, as plain JSON values.

    Example:
        >>> Candidate("net", Widths(("conv1",), (8,)), {"proposer": "uniform", "budget": 0.5}).space
        'net'
    """

    space: str
    widths: Widths
    origin: Mapping[str, object]


def family_candidates(
    spaces: Mapping[str, SearchSpace],
    proposals: Mapping[str, Sequence[Proposal]],
    budgets: Sequence[float],
    families: Sequence[FamilyName | Literal["mixture"]] = ("linear",),
) -> list[Candidate]:
    """Every proposal scaled to every budget in every family, without repeats.

    Args:
        spaces: The spaces by name.
        proposals: The proposals by name of the space.
        budgets: Shares of the MACs of the first space's base.
        families: The families; ``mixture`` mixes the linear members of each pair of proposals.

    Returns:
        Candidates with the origin ``{"proposer", "family", "budget"}``.

    Raises:
        WidthsError: A budget is below the narrowest network of every space.
    """
    out: dict[tuple[str, Widths], Candidate] = {}
    for budget in budgets:
        for space, macs in spaces_within(spaces, budget):
            own = proposals.get(space.name, ())
            for family in families:
                if family == "mixture":
                    pairs = list(itertools.combinations(own, 2))
                    names = [f"{a.method}+{b.method}" for a, b in pairs]
                    found = [mix_proposals(space, pair, macs) for pair in pairs]
                else:
                    names = [proposal.method for proposal in own]
                    found = [scale_proposal(space, proposal, macs, family) for proposal in own]
                for name, widths in zip(names, found, strict=True):
                    origin = {"proposer": name, "family": family, "budget": budget}
                    out.setdefault((space.name, widths), Candidate(space.name, widths, origin))
    return list(out.values())


def spaces_within(
    spaces: Mapping[str, SearchSpace], budget: float
) -> list[tuple[SearchSpace, float]]:
    """The spaces whose networks can meet a budget, each with the budget in MACs.

    A budget above the widest network excludes a space, but not the first one.
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
        LinearFamily(first, first.base).solve(macs)  # raises: the budget is too small
    return found
