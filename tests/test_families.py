"""Families: members on the grid, and the widest member within a budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import refused, space_of, spaces, widths_of
from torch import nn

from widthsearch.errors import WidthsError
from widthsearch.proposers import Proposal
from widthsearch.proposers.families import (
    Family,
    FamilyName,
    LinearFamily,
    PowerFamily,
    family_candidates,
    lowest_share,
    scale_proposal,
)
from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Widths


@settings(max_examples=50, deadline=None)
@given(st.data(), spaces)
def test_a_budget_is_solved_exactly(data: st.DataObject, space: SearchSpace) -> None:
    """The member is on the grid, within the budget, and the next one is not."""
    family = LinearFamily(space, Widths(space.names, data.draw(widths_of(space))))
    costs = space.macs(family.members)
    budget = data.draw(st.floats(float(costs[0]), float(costs[-1]) * 1.1))
    solved = family.solve(budget)
    assert space.widths(solved.vector) == solved
    cost = int(space.macs(solved))
    assert cost <= budget
    beyond = costs[costs > cost]
    assert not len(beyond) or beyond.min() > budget


@settings(max_examples=50, deadline=None)
@given(st.data(), spaces)
def test_members_differ_by_one_step_of_one_axis(data: st.DataObject, space: SearchSpace) -> None:
    """From the narrowest to the widest network of the space, through the profile itself."""
    profile = Widths(space.names, data.draw(widths_of(space)))
    members = LinearFamily(space, profile).members
    assert members[0].tolist() == [axis.min_width for axis in space.axes]
    assert members[-1].tolist() == [axis.max_width for axis in space.axes]
    steps = np.diff(members, axis=0)
    assert ((steps > 0).sum(1) == 1).all()
    assert (steps.sum(0) == [axis.max_width - axis.min_width for axis in space.axes]).all()
    assert list(profile.vector) in members.tolist()


def test_scaling_the_base_by_a_half() -> None:
    """By hand: nearest(τ · base) has a member of half and one of twice all widths."""
    space = space_of("Residual")
    members = LinearFamily(space, space.base).members.tolist()
    assert [8, 16] in members
    assert [32, 64] in members


def test_a_budget_below_the_space_is_refused() -> None:
    """The error names the space and its smallest MACs."""
    space = space_of("Residual")
    least = int(space.macs([2, 4]))
    message = f"is below the narrowest network of space 'Residual', which has {least:,}"
    with refused(WidthsError, message, whole=False):
        LinearFamily(space, space.base).solve(least - 1)


def test_candidates_are_distinct_and_have_an_origin() -> None:
    """Two proposals that agree at a budget give one candidate, of the first method."""
    space = space_of("Residual")
    a = Proposal("a", (space.base, space.widths(0.5)), {})
    b = Proposal("b", (space.base, space.widths([4, 24])), {})
    found = family_candidates({"Residual": space}, {"Residual": [a, b]}, [0.25, 1.0])
    quarters = [scale_proposal(space, p, 0.25 * space.cost(1.0).macs) for p in (a, b)]
    assert [c.widths for c in found[:2]] == quarters
    origins = [(c.origin["proposer"], c.origin["budget"]) for c in found]
    assert origins == [("a", 0.25), ("b", 0.25), ("a", 1.0), ("b", 1.0)]
    a, uniform = (Proposal(name, (space.base, space.widths(0.5)), {}) for name in ("a", "b"))
    same = family_candidates({"Residual": space}, {"Residual": [a, uniform]}, [0.25, 1.0])
    assert [(c.origin["proposer"], c.origin["budget"]) for c in same] == [("a", 0.25), ("a", 1.0)]


def test_a_shape_is_kept_at_every_size() -> None:
    """Wider than the base a linear family is the copycat, which has one profile throughout."""
    space = space_of("Residual").constrained(step=1)
    base = space.cost(space.base).macs
    path = (space.base, space.widths([12, 32]), space.widths([4, 32]), space.widths([4, 16]))
    quarter = path[2]  # of the MACs; the others have 0.75 and 0.13
    proposal = Proposal("any", path, {})
    copycat = LinearFamily(space, quarter)
    for share in (0.13, 0.7, 1.0, 1.9):
        found = {
            name: scale_proposal(space, proposal, share * base, name)
            for name in ("linear", "copycat")
        }
        assert found["copycat"] == copycat.solve(share * base)
        own = {0.13: path[3], 0.7: path[1]}.get(share, quarter)
        assert found["linear"] == LinearFamily(space, own).solve(share * base)
        assert found["linear"] != LinearFamily(space, space.base).solve(share * base)
    fixed = Proposal("fixed", path, {}, profile=path[1])
    for name in ("linear", "power", "copycat"):
        for share in (0.13, 1.9):
            found_ = scale_proposal(space, fixed, share * base, name)
            assert found_ == LinearFamily(space, path[1]).solve(share * base)


def test_trajectories_reach_what_families_scale() -> None:
    """A quarter for copycats, and for linear families that are scaled to the base or beyond."""
    assert lowest_share([0.1, 0.5], ["copycat"]) == 0.1
    assert lowest_share([0.5, 0.75], ["power", "copycat"]) == 0.25
    assert lowest_share([0.5, 1.5], ["linear"]) == 0.25
    assert lowest_share([0.5, 0.75], ["linear", "power"]) == 0.5


def test_several_spaces_share_their_budgets_in_macs() -> None:
    """Shares refer to the first base; a space without a network of a budget is left out."""
    spaces = {name: space_of(name) for name in ("Grouped", "Residual")}  # 71k and 618k MACs
    proposed = {name: [Proposal("p", (s.base,), {})] for name, s in spaces.items()}
    base = 70_736
    found = family_candidates(spaces, proposed, [0.1, 0.5, 3.9, 8.0])
    assert [(c.space, c.origin["budget"]) for c in found] == [
        ("Grouped", 0.1),  # Residual has 12,692 MACs at least
        ("Grouped", 0.5),
        ("Residual", 0.5),
        ("Grouped", 3.9),
        ("Residual", 3.9),
        ("Grouped", 8.0),  # its widest network, 276,640 MACs: the first space takes part
        ("Residual", 8.0),
    ]
    for c in found:
        assert spaces[c.space].cost(c.widths).macs <= float(str(c.origin["budget"])) * base


def test_a_power_family_by_hand() -> None:
    """A constant axis has β = 0; the β of the other axis is the slope of its log width."""
    space = space_of("Residual").constrained(step={"stem": 1, "conv1": 1})
    path = [space.widths([16, 32]), space.widths([16, 16]), space.widths([16, 8])]
    family = PowerFamily.fit(space, path)
    tau = np.log(space.macs([widths.vector for widths in path]))
    slope = np.polyfit(tau, np.log([32.0, 16.0, 8.0]), 1)[0]
    assert family.beta == pytest.approx([0.0, slope])
    members = family.members
    begun = members[:, 1] > space.axes[1].min_width
    assert set(members[begun, 0]) == {16}  # reached at once, and never left
    assert members[-1, 1] == space.axes[1].max_width
    wide = family.solve(2 * space.cost(space.base).macs)
    assert wide["stem"] == 16
    assert wide["conv1"] > 32


def test_a_steep_trend_is_followed() -> None:
    """An axis that costs little narrows at almost equal MACs: its α is below the least float."""
    net = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 1))
    space = SearchSpace.from_model(net, (512,), max_width=1.0)
    family = PowerFamily.fit(space, [space.base, space.widths([64, 2])])
    assert np.exp(family.log_alpha[1]) == 0.0
    assert family.solve(space.cost(space.base).macs) == space.base
    assert family.solve(space.cost([64, 8]).macs).vector == (64, 8)


def test_a_power_family_is_not_fitted_to_clipped_widths() -> None:
    """An axis counts up to the first member with its smallest width."""
    space = space_of("Residual").constrained(step={"stem": 1, "conv1": 1})
    vectors = [(16, 32), (16, 16), (16, 8), (16, 4), (8, 4), (4, 4), (2, 4)]
    assert [axis.min_width for axis in space.axes] == [2, 4]
    family = PowerFamily.fit(space, [space.widths(vector) for vector in vectors])
    tau, logs = np.log(space.macs(vectors)), np.log(vectors)
    slopes = np.polyfit(tau, logs[:, 0], 1)[0], np.polyfit(tau[:4], logs[:4, 1], 1)[0]
    assert family.beta == pytest.approx(slopes)
    assert slopes[1] > 1.5 * np.polyfit(tau, logs[:, 1], 1)[0]


@given(st.data(), spaces, st.sampled_from(["linear", "power", "copycat"]))
def test_families_meet_budgets_within_a_step(
    data: st.DataObject, space: SearchSpace, name: FamilyName
) -> None:
    """From below, along members that differ by single steps."""
    wide = data.draw(widths_of(space))
    narrow = [min(a, b) for a, b in zip(wide, data.draw(widths_of(space)), strict=True)]
    trajectory = tuple(dict.fromkeys([space.widths(wide), space.widths(narrow)]))
    proposal = Proposal("any", trajectory, {})
    steps = np.array([axis.step for axis in space.axes])
    family: Family = LinearFamily(space, trajectory[0])
    if name == "power" and len(trajectory) > 1:
        family = PowerFamily.fit(space, trajectory)
    moves = np.diff(family.members, axis=0)
    assert ((moves == 0) | (moves == steps)).all()
    assert ((moves > 0).sum(1) == 1).all()
    budget = data.draw(st.integers(int(space.macs(family.members[0])), 10**7))
    assert space.macs(scale_proposal(space, proposal, budget, name).vector) <= budget


def test_a_mixture_lies_between_its_proposals() -> None:
    """It is the geometric mean of both, scaled to the budget, and has both names."""
    space = space_of("Residual")
    a = Proposal("a", (space.widths([16, 8]),), {})
    b = Proposal("b", (space.widths([4, 32]),), {})
    families = ["linear", "mixture", "power"]
    found = family_candidates({"Residual": space}, {"Residual": [a, b]}, [0.3], families)
    origins = [(c.origin["proposer"], c.origin["family"]) for c in found]
    # With one member, power is linear.
    assert origins == [("a", "linear"), ("b", "linear"), ("a+b", "mixture")]
    shares = [w / h for w, h in (c.widths.vector for c in found)]
    assert shares[1] < shares[2] < shares[0]
