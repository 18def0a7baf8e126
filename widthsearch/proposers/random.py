"""Random widths: a baseline that is hard to beat."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from widthsearch.proposers.protocol import Count, Proposal, Setting
from widthsearch.utils.validation import validated_dataclass

if TYPE_CHECKING:
    from widthsearch.data.tasks import AnyTask
    from widthsearch.space.search_space import SearchSpace


@validated_dataclass("random")
class Random:
    """A random profile, scaled: each axis draws a share of its base.

    Attributes:
        lowest: Shares are drawn log-uniformly between this value and 1; default 0.25.
        members: Members of the trajectory, evenly spaced multiples of the profile: the first is the
            largest one in which no axis exceeds its base; default 16.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 2))
        >>> space = SearchSpace.from_model(net, (4,), step=2)
        >>> proposal = Random(members=3)(space, None, Setting(seed=1))
        >>> [widths.vector for widths in proposal.trajectory]
        [(8, 6), (6, 4), (2, 2)]
    """

    lowest: Annotated[float, Field(gt=0, le=1)] = 0.25
    members: Count = 16
    reads_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __call__(self, space: SearchSpace, task: AnyTask | None, setting: Setting) -> Proposal:
        """Draw and scale a profile; it depends on the seed alone."""
        generator = random.Random(setting.seed)
        shares = [self.lowest ** generator.random() for _ in space.axes]
        top = max(shares)
        scales = [(1 - i / self.members) / top for i in range(self.members)]
        profile = [axis.base * share for axis, share in zip(space.axes, shares, strict=True)]
        found = dict.fromkeys(space.nearest([w * by for w in profile]) for by in scales)
        trajectory, provenance = tuple(found), {"seed": setting.seed, **asdict(self)}
        return Proposal("random", trajectory, provenance, profile=trajectory[0])
