"""Random widths: the other baseline, and a strong one."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from widthsearch.errors import StudyError
from widthsearch.proposers.importance import check_counts
from widthsearch.proposers.protocol import Proposal, Setting
from widthsearch.widths import Widths

if TYPE_CHECKING:
    from widthsearch.data.tasks import Task
    from widthsearch.space.search_space import SearchSpace


@dataclass(frozen=True)
class Random:
    """A random profile: each axis's share of its base is drawn anew, then all are scaled.

    Attributes:
        lowest: Shares are drawn log-uniformly between this and 1.
        members: Multiples of the profile, evenly spaced, from the first that needs no axis beyond
            its base down to the narrowest.
    """

    lowest: float = 0.25
    members: int = 16
    reads_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "members")
        if not 0 < self.lowest <= 1:
            raise StudyError(f"`0 < lowest <= 1` must hold, but random has lowest={self.lowest!r}")

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """Depends on the seed alone."""
        generator = random.Random(setting.seed)
        shares = [self.lowest ** generator.random() for _ in space.axes]
        top = max(shares)
        trajectory: dict[Widths, None] = {}
        for i in range(self.members):
            scale = (1 - i / self.members) / top
            vector = [a.base * s * scale for a, s in zip(space.axes, shares, strict=True)]
            trajectory[space.nearest(vector)] = None
        return Proposal(
            "random",
            tuple(trajectory),
            {"seed": setting.seed, "lowest": self.lowest, "members": self.members},
        )
