"""Tapered widths: wider or narrower with depth, a baseline that looks at nothing."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from widthsearch.proposers.protocol import Count, Proposal, Setting
from widthsearch.utils.validation import validated_dataclass

if TYPE_CHECKING:
    from widthsearch.data.tasks import AnyTask
    from widthsearch.space.search_space import SearchSpace

SLOPES = (-1.0, -0.5, 0.5, 1.0)
"""The slopes of the baselines."""


@validated_dataclass("taper")
class Taper:
    """Uniform widths times exp(slope · depth), with the depth from -1 (first axis) to 1 (last).

    The curve is that of RegNet (Radosavovic et al. 2020, arXiv 2003.13678), whose widths grow with
    depth, applied to the ratios of widths to the base.

    Attributes:
        slope: Above 0 late axes are wider than uniform widths, below 0 early ones; default -0.5.
        members: Members of the trajectory, evenly spaced multiples of the profile: the first is the
            largest one in which no axis exceeds its base; default 16.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 2))
        >>> space = SearchSpace.from_model(net, (4,), step=1)
        >>> proposal = Taper(slope=-0.5, members=3)(space, None, Setting())
        >>> [widths.vector for widths in proposal.trajectory]  # 16 / e is 5.9
        [(8, 6), (5, 4), (3, 2)]
    """

    slope: Annotated[float, Field(ge=-3, le=3)] = -0.5
    members: Count = 16
    reads_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __call__(self, space: SearchSpace, task: AnyTask | None, setting: Setting) -> Proposal:
        """Scale the tapered profile; the result depends on neither the data nor the seed."""
        gaps = max(1, len(space.axes) - 1)
        shares = [math.exp(self.slope * (2 * i / gaps - 1)) for i in range(len(space.axes))]
        profile = [
            a.base * share / max(shares) for a, share in zip(space.axes, shares, strict=True)
        ]
        scales = [1 - i / self.members for i in range(self.members)]
        found = dict.fromkeys(space.nearest([w * by for w in profile]) for by in scales)
        trajectory, provenance = tuple(found), {"seed": setting.seed, **asdict(self)}
        return Proposal("taper", trajectory, provenance, profile=trajectory[0])
