"""Balanced widths: the largest Σ log w within a budget, a baseline that looks at nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from widthsearch.proposers.importance import GreedyRemoval
from widthsearch.proposers.protocol import Count, Proposal, Setting
from widthsearch.utils.validation import validated_dataclass

if TYPE_CHECKING:
    from widthsearch.data.tasks import AnyTask
    from widthsearch.space.search_space import SearchSpace

PULL = 0.3
"""The pull towards the base's profile, see :func:`step_losses`."""


@validated_dataclass("balanced")
class Balanced:
    """The largest Σ log w within a budget of MACs: every axis has the same share of marginal cost.

    At the optimum ``w ∂F/∂w`` is the same for all axes (F are the MACs), as far as no axis is wider
    than the base. In a plain chain of layers that holds nearly as well for widths that alternate
    between wide and narrow, where the MACs of each second layer vanish: nothing is gained by them,
    and such networks train badly. A weak pull towards the base's profile excludes them.

    No data, no weights and no seed decide: what a method gains over these widths is its own worth,
    beyond the arithmetic of costs.

    Attributes:
        members: Members of the trajectory, evenly spaced in log MACs; default 32.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 256))
        >>> space = SearchSpace.from_model(net, (4,), step=8)
        >>> space.cost([64, 32]).macs, space.cost([32, 64]).macs  # the second axis costs more
        (10496, 18560)
        >>> Balanced(members=4)(space, None, Setting()).trajectory[1].vector
        (64, 24)
    """

    members: Count = 32
    reads_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __call__(self, space: SearchSpace, task: AnyTask | None, setting: Setting) -> Proposal:
        """Narrow the base step by step; the result depends on neither the data nor the seed."""
        removal, base = GreedyRemoval(space, per="macs"), np.array(space.base.vector)
        steps = np.array([axis.step for axis in space.axes])
        while (axis := removal.weakest(step_losses(removal.widths, base, steps))) is not None:
            removal.remove(axis)
        provenance = {"seed": setting.seed, **asdict(self)}
        return Proposal("balanced", removal.trajectory(self.members), provenance)


def step_losses(
    widths: NDArray[np.int64], base: NDArray[np.int64], steps: NDArray[np.int64], pull: float = PULL
) -> NDArray[np.float64]:
    """The loss of Σ log w when each axis is narrowed by a step, (axes,).

    Each loss is weighted by 1 - pull · (x - mean x), with x = log(w / base): the objective is then
    Σ x - pull/2 · Σ (x - mean x)², of the optima of Σ log w nearly the one nearest to the base's
    profile.
    """
    x = np.log(widths / base)
    narrower = np.maximum(widths - steps, 1e-9 * widths)  # no axis without channels is asked for
    weights = np.maximum(1 - pull * (x - x.mean()), 0.0)
    losses: NDArray[np.float64] = weights * np.log(widths / narrower)
    return losses
