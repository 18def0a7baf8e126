"""Uniform widths: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar

from widthsearch.proposers.protocol import Count, Proposal, Setting
from widthsearch.utils.validation import validated_dataclass

if TYPE_CHECKING:
    from widthsearch.data.tasks import AnyTask
    from widthsearch.space.search_space import SearchSpace


@validated_dataclass("uniform")
class Uniform:
    """One width multiplier for all axes: MobileNets (Howard et al. 2017, arXiv 1704.04861), 3.3.

    Attributes:
        members: Members of the trajectory, evenly spaced multipliers from 1 down to the narrowest
            network; default 16.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 2))
        >>> space = SearchSpace.from_model(net, (4,), step=2)
        >>> proposal = Uniform(members=3)(space, None, Setting())
        >>> [widths.vector for widths in proposal.trajectory]
        [(8, 16), (4, 10), (2, 2)]
    """

    members: Count = 16
    reads_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __call__(self, space: SearchSpace, task: AnyTask | None, setting: Setting) -> Proposal:
        """Scale the base; the result depends on neither the data nor the seed."""
        lowest = min(axis.min_width / axis.base for axis in space.axes)
        multipliers = [1 - (1 - lowest) * i / max(1, self.members - 1) for i in range(self.members)]
        trajectory = dict.fromkeys(space.widths(m) for m in multipliers)
        provenance = {"seed": setting.seed, **asdict(self)}
        return Proposal("uniform", tuple(trajectory), provenance, profile=space.base)
