"""A constant score per MAC: greedy removal without any information, as a baseline."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from widthsearch.proposers.importance import GreedyRemoval
from widthsearch.proposers.protocol import Count, Proposal, Setting
from widthsearch.utils.validation import validated_dataclass

if TYPE_CHECKING:
    from widthsearch.data.tasks import AnyTask
    from widthsearch.space.search_space import SearchSpace


@validated_dataclass("constant")
class Constant:
    """All channels have the same score, and those that cost most MACs are removed first.

    This is the greedy removal per MAC of ``sensitivity``, ``synflow`` and the others with their
    scores left out: what such a method gains over it is the worth of its scores.

    Attributes:
        members: Members of the trajectory, evenly spaced in log MACs; default 32.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 2))
        >>> space = SearchSpace.from_model(net, (4,), step=4)
        >>> [widths.vector for widths in Constant()(space, None, Setting()).trajectory]
        [(8, 16), (4, 16), (4, 12), (4, 8), (4, 4)]
    """

    members: Count = 32
    reads_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __call__(self, space: SearchSpace, task: AnyTask | None, setting: Setting) -> Proposal:
        """Narrow the base step by step; the result depends on neither the data nor the seed."""
        removal = GreedyRemoval(space, per="macs")
        removal.remove_lowest([np.ones(axis.base) for axis in space.axes])
        provenance = {"seed": setting.seed, **asdict(self)}
        return Proposal("constant", removal.trajectory(self.members), provenance)
