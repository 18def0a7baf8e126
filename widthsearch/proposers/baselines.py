"""The baselines of a search: networks whose widths follow from costs, depth or chance alone.

None of them looks at data, weights or gradients. Uniform widths come first, at every budget. The
other kinds rotate over the budgets, so that a small study has some of each, and a large one all of
them everywhere. After that, there are only further random widths to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from widthsearch.proposers.balanced import Balanced
from widthsearch.proposers.constant import Constant
from widthsearch.proposers.families import Candidate, scale_proposal, spaces_within
from widthsearch.proposers.protocol import Proposal, Proposer, Setting
from widthsearch.proposers.random import Random
from widthsearch.proposers.taper import SLOPES, Taper
from widthsearch.proposers.uniform import Uniform
from widthsearch.widths import Widths

if TYPE_CHECKING:
    from widthsearch.space.search_space import SearchSpace

_OTHERS: tuple[Proposer, ...] = (
    Balanced(),
    Taper(slope=-0.5),
    Random(),
    Constant(),
    *(Taper(slope=slope) for slope in SLOPES if slope != -0.5),
)


def baseline_candidates(
    spaces: Mapping[str, SearchSpace], budgets: Sequence[float], count: int, seed: int
) -> list[Candidate]:
    """The baselines of a search at the budgets of its proposals.

    With several spaces, uniform widths form a grid of depth × width. If ``count`` is smaller than
    the grid, the baselines are spread evenly over it.

    Args:
        spaces: The spaces by name.
        budgets: Shares of the MACs of the first space's base.
        count: The number of baselines; fewer are returned if widths repeat.
        seed: The seed of the random widths.

    Returns:
        Candidates with the origin of :func:`~widthsearch.proposers.families.family_candidates`,
        ``"baseline": True``, and the slope of tapered widths.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 256))
        >>> space = SearchSpace.from_model(net, (4,))
        >>> found = baseline_candidates({space.name: space}, [0.25, 0.5], count=4, seed=0)
        >>> [(c.origin["proposer"], c.origin["budget"]) for c in found]
        [('uniform', 0.25), ('uniform', 0.5), ('balanced', 0.25), ('taper', 0.5)]
    """
    places = [(budget, *place) for budget in budgets for place in spaces_within(spaces, budget)]
    if count < len(places):
        spread = np.linspace(0, len(places) - 1, count).round().astype(int)
        places = [places[i] for i in spread]
    out: dict[tuple[str, Widths], Candidate] = {}
    proposals: dict[tuple[str, Proposer], Proposal] = {}
    # Usually each turn adds len(places) baselines. Where widths repeat, `count` turns of random
    # widths may still add fewer than `count`.
    for turn in range(count + len(_OTHERS)):
        for i, (budget, space, macs) in enumerate(places):
            if len(out) == count:
                break
            method = _method(turn, i)
            if isinstance(method, Random):
                own = int(np.random.SeedSequence((seed, turn, i)).generate_state(1)[0])
                proposal = method(space, None, Setting(own))
            else:
                known = space.name, method
                if known not in proposals:
                    proposals[known] = method(space, None, Setting())  # type: ignore[arg-type]
                proposal = proposals[known]
            origin: dict[str, Any] = {"proposer": proposal.method, "family": "linear"}
            origin |= {"budget": budget, "baseline": True}
            origin |= {"slope": method.slope} if isinstance(method, Taper) else {}
            widths = scale_proposal(space, proposal, macs)
            out.setdefault((space.name, widths), Candidate(space.name, widths, origin))
    return list(out.values())


def _method(turn: int, place: int) -> Proposer:
    """The kind of a baseline: uniform in turn 0, then each other kind once, then random."""
    if turn == 0:
        return Uniform()
    return _OTHERS[(turn - 1 + place) % len(_OTHERS)] if turn <= len(_OTHERS) else Random()
