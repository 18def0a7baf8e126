"""The methods that a table judges, and the rows of a table that their proposals are.

The methods see the space on the table's grid: each axis from its narrowest to its widest width in
the table, in steps of the greatest common divisor of these widths and the base's. A proposal is
scaled to a budget as everywhere (:func:`~widthsearch.proposers.families.scale_proposal`), so that
it is a network of this grid within the budget; where the table lacks it, the nearest row stands
for it (in the sum of distances of log widths).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.search import Table
from widthsearch.data.tasks import AnyTask, OwnTask
from widthsearch.errors import SpaceError, StudyError, WidthsearchError
from widthsearch.proposers import (
    BASELINES,
    PROPOSERS,
    Proposal,
    Proposer,
    Setting,
    proposer_class,
)
from widthsearch.proposers.families import FamilyName, mix_proposals, scale_proposal
from widthsearch.proposers.random import Random
from widthsearch.proposers.sensitivity import Sensitivity
from widthsearch.proposers.slimming import Slimming
from widthsearch.proposers.synflow import SynFlow
from widthsearch.proposers.taper import SLOPES, Taper
from widthsearch.proposers.taylor import Taylor
from widthsearch.space.computation import floats
from widthsearch.space.search_space import SearchSpace
from widthsearch.torch_internals import tree_map_only
from widthsearch.tracing.inputs import call, sample
from widthsearch.widths import Widths

VARIANTS: Mapping[str, Mapping[str, Proposer]] = {
    "sensitivity": {
        "sensitivity cost fixed": Sensitivity(cost="fixed"),
        "sensitivity per channel": Sensitivity(per="channel"),
    },
    "synflow": {"synflow per channel": SynFlow(per="channel")},
    "slimming": {"slimming per channel": Slimming(per="channel")},
    "taylor": {"taylor per channel": Taylor(per="channel")},
    "taper": {f"taper {s:g}": Taper(slope=s) for s in SLOPES if s != Taper().slope},
}
"""Further settings of some methods, beside their defaults."""

FAMILIES: tuple[FamilyName, ...] = ("linear", "copycat", "power")
DIFFERENCE = 0.05
"""The largest relative difference of MACs that passes as another way of counting."""
DRAWS = 50
"""The seeds of random widths, which cost nothing."""
LARGE = 100e6
"""The MACs above which methods look at a narrower network."""


def methods() -> dict[str, Proposer]:
    """Every method with its defaults, and the variants, by name."""
    out: dict[str, Proposer] = {}
    for name in PROPOSERS:
        out[name] = proposer_class(name)()
        out.update(VARIANTS.get(name, {}))
    return out


def trains(method: Proposer) -> bool:
    """Whether a method trains a network before it proposes."""
    return getattr(method, "trains", True)


def on_table(space: SearchSpace, table: Table) -> tuple[SearchSpace, Table]:
    """The space on the table's grid, and the table in the order of its axes with its MACs.

    Columns are named ``width_<axis>``, or are in the order of the axes.

    Raises:
        StudyError: The table has other axes.
    """
    named = [name.removeprefix("width_") for name in table.names]
    axes = ", ".join(f"{axis.name} ({axis.base})" for axis in space.axes)
    if len(named) != len(space.axes):
        raise StudyError(
            f"the table's columns width_* must be the axes of space {space.name!r}, but it has "
            f"{len(named)} of them and the space {len(space.axes)}: {axes}"
        )
    order = range(len(named))
    if set(named) == set(space.names):
        order = [named.index(name) for name in space.names]
    widths = table.widths[:, list(order)]
    steps, low, high = {}, {}, {}
    for axis, traced, levels in zip(space.axes, space.trace.axes, widths.T, strict=True):
        if (levels % traced.divisor).any():
            raise StudyError(
                f"the table's widths must be networks of space {space.name!r}, but axis "
                f"{axis.name!r} takes multiples of {traced.divisor}, and the table has "
                f"{levels[levels % traced.divisor > 0][0]}"
            )
        steps[axis.name] = math.gcd(axis.base, int(np.gcd.reduce(levels)))
        low[axis.name] = min(axis.base, int(levels.min()))
        high[axis.name] = max(axis.base, int(levels.max()))
    macs = space.macs(widths)
    off = np.abs(macs / table.macs - 1)
    worst = int(off.argmax())
    if not off[worst] <= DIFFERENCE:
        raise StudyError(
            f"the table's MACs must be those of space {space.name!r}, but of the widths "
            f"{widths[worst].tolist()} it has {table.macs[worst]:,} and the space "
            f"{macs[worst]:,}: name the space of these networks, with columns width_* in the order "
            f"of its axes: {axes}"
        )
    own = Table(space.names, widths, macs, table.params, table.accuracy)
    return space.constrained(min_width=low, max_width=high, step=steps), own


def narrowed(space: SearchSpace, by: int | None = None) -> tuple[SearchSpace, int]:
    """A space with all widths divided by a whole number, and that number.

    Its base, bounds and steps are those of ``space``, divided; costs are nearly in proportion.

    Args:
        space: A space.
        by: The number; by default the lowest power of two at which the base has at most
            :data:`LARGE` MACs, or the highest that divides every step.

    Raises:
        SpaceError: It does not divide every step.
    """
    divisible = math.gcd(
        *(a.step // t.divisor for a, t in zip(space.axes, space.trace.axes, strict=True))
    )
    if by is not None and divisible % by:
        raise SpaceError(
            f"`--narrow` must divide the steps of all axes, that is {divisible}, but was {by}"
        )
    chosen = by or 1
    while by is None and divisible % (2 * chosen) == 0 and _divided(space, chosen) > LARGE:
        chosen *= 2
    if chosen == 1:
        return space, 1
    widths = Widths(space.names, tuple(w // chosen for w in space.base.vector))
    small = SearchSpace.from_model(space.build(widths), space.input_shape, name=space.name)
    if small.names != space.names:  # some axes are pinned or tied
        if by is None:
            return space, 1
        raise SpaceError("`--narrow` needs a space without pinned or tied axes; leave it out")
    return small.constrained(
        min_width={a.name: a.min_width // chosen for a in space.axes},
        max_width={a.name: a.max_width // chosen for a in space.axes},
        step={a.name: a.step // chosen for a in space.axes},
    ), chosen


def _divided(space: SearchSpace, by: int) -> int:
    return int(space.macs(np.array(space.base.vector) // by))


def widened(space: SearchSpace, proposal: Proposal, by: int) -> Proposal:
    """A proposal of a narrowed space as one of the space itself."""
    *members, profile = (
        widths and Widths(space.names, tuple(w * by for w in widths.vector))
        for widths in (*proposal.trajectory, proposal.profile)
    )
    trajectory = tuple(widths for widths in members if widths is not None)
    return Proposal(proposal.method, trajectory, proposal.provenance, profile)


def noise(space: SearchSpace, count: int) -> OwnTask:
    """A task without data: normally distributed inputs, and classes in turn.

    Integer inputs are those of the space's sample. An output that is no vector of classes has
    normally distributed targets, and the mean square as its loss.

    Args:
        space: The space.
        count: The samples of the one batch.
    """

    def batches(split: str, seed: int) -> list[Any]:
        rng = torch.Generator().manual_seed(seed)
        return [
            tree_map_only(
                Tensor,
                lambda t: torch.randn(t.shape, generator=rng) if t.is_floating_point() else t,
                sample(space.input_shape, count, "cpu"),
            )
        ]

    def loss(network: nn.Module, batch: Any) -> Tensor:
        output = next(floats(call(network, batch))).float()
        if output.dim() == 2 and output.shape[1] > 1:
            classes = torch.arange(len(output), device=output.device) % output.shape[1]
            return F.cross_entropy(output, classes)
        rng = torch.Generator().manual_seed(0)
        return F.mse_loss(output, torch.randn(output.shape, generator=rng).to(output))

    return OwnTask(loss, batches, "noise")


@dataclass(frozen=True, eq=False)
class Proposed:
    """What a method proposes in one family.

    Attributes:
        rows: Rows of the table, (seeds, budgets).
        exact: The share of proposals that are networks of the table; the rest have the nearest row.
    """

    rows: NDArray[np.intp]
    exact: float


@dataclass(frozen=True, eq=False)
class Proposals:
    """The proposals of methods, and the rows that they are at some budgets.

    Attributes:
        space: The space on the table's grid.
        table: The table.
        budgets: MACs.
        seeds: The number of seeds of each method; random widths have :data:`DRAWS`.
        setting: The circumstances of every proposal but for the seed.
        task: The data of methods that read some; None for noise.
        narrow: See :func:`narrowed`.
    """

    space: SearchSpace
    table: Table
    budgets: Sequence[float]
    seeds: int
    setting: Callable[[int], Setting]
    task: AnyTask | None = None
    narrow: int | None = None

    def rows(
        self, chosen: Mapping[str, Proposer], skipped: Callable[[str, str], object]
    ) -> Iterator[tuple[str, Proposed]]:
        """What each method proposes in each family, by name.

        The linear family of a method has the method's name, as in ``synflow``; others follow it,
        as in ``synflow, copycat``; ``sensitivity+synflow, mixture`` is of two methods. A method of
        one profile at all sizes has one family.

        Args:
            chosen: The methods.
            skipped: Called with the name of a method that cannot propose, and the reason.
        """
        small, by = narrowed(self.space, self.narrow)
        kept: dict[str, list[Proposal]] = {}
        for name, method in chosen.items():
            try:
                proposals = [
                    widened(self.space, self.propose(method, small, seed), by)
                    for seed in range(DRAWS if isinstance(method, Random) else self.seeds)
                ]
            except WidthsearchError as error:
                skipped(name, str(error))
                continue
            families = FAMILIES if any(p.profile is None for p in proposals) else FAMILIES[:1]
            for family in families:
                title = name if family == "linear" else f"{name}, {family}"
                yield title, self._scaled(proposals, family)
            if name in PROPOSERS and name not in BASELINES:
                kept[name] = proposals
        for first, second in combinations(kept, 2):
            pairs = list(zip(kept[first], kept[second], strict=True))
            found = [[mix_proposals(self.space, p, b) for b in self.budgets] for p in pairs]
            yield f"{first}+{second}, mixture", self._of(found)

    def propose(self, method: Proposer, space: SearchSpace, seed: int) -> Proposal:
        """The proposal of a method in a space."""
        task = self.task or noise(space, getattr(method, "batch_size", 64))
        return method(space, task, self.setting(seed))

    def _scaled(self, proposals: Sequence[Proposal], family: FamilyName) -> Proposed:
        return self._of(
            [[scale_proposal(self.space, p, b, family) for b in self.budgets] for p in proposals]
        )

    def _of(self, found: Sequence[Sequence[Widths]]) -> Proposed:
        vectors = np.array([[widths.vector for widths in of_seed] for of_seed in found], np.int64)
        rows = self.table.rows(vectors.reshape(-1, vectors.shape[-1])).reshape(vectors.shape[:-1])
        exact = (self.table.widths[rows] == vectors).all(axis=-1)
        return Proposed(rows, float(exact.mean()))
