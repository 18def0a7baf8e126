"""Uniform width scaling: the baseline that every comparison needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from widthsearch.proposers.importance import check_counts
from widthsearch.proposers.protocol import Proposal, Setting

if TYPE_CHECKING:
    from widthsearch.data.tasks import Task
    from widthsearch.space.search_space import SearchSpace


@dataclass(frozen=True)
class Uniform:
    """Every axis times one multiplier (MobileNets, Howard et al. 2017, section 3.3).

    Attributes:
        members: Multipliers from 1 down to the narrowest, evenly spaced.
    """

    members: int = 16
    reads_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "members")

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """The base, scaled; depends on neither data nor seed."""
        lowest = min(axis.min_width / axis.base for axis in space.axes)
        multipliers = [1 - (1 - lowest) * i / max(1, self.members - 1) for i in range(self.members)]
        trajectory = dict.fromkeys(space.widths(m) for m in multipliers)
        return Proposal(
            "uniform", tuple(trajectory), {"seed": setting.seed, "members": self.members}
        )
