"""The baselines: widths that follow from costs, depth or chance, and how a study spreads them."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from conformance import ProposerConformance
from hypothesis import given, settings
from strategies import space_of, spaces
from torch import nn

from widthsearch.proposers import BASELINES, Setting
from widthsearch.proposers.balanced import PULL, Balanced, step_losses
from widthsearch.proposers.baselines import baseline_candidates
from widthsearch.proposers.constant import Constant
from widthsearch.proposers.families import LinearFamily, scale_proposal
from widthsearch.proposers.importance import GreedyRemoval
from widthsearch.proposers.taper import SLOPES, Taper
from widthsearch.space.search_space import SearchSpace


class TestBalanced(ProposerConformance):
    """The largest Σ log w."""

    method = "balanced"
    proposer = Balanced()


class TestConstant(ProposerConformance):
    """A constant score per MAC."""

    method = "constant"
    proposer = Constant()


class TestTaper(ProposerConformance):
    """Wider with depth."""

    method = "taper"
    proposer = Taper(slope=0.5)


def chain(*widths: int) -> SearchSpace:
    """Convolutions of 3×3 on maps of 8×8, then a linear layer; grids of two channels."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, *widths)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
        return nn.Sequential(*layers, *head)

    return SearchSpace.from_model(make, (3, 8, 8), min_width=0.125, step=2)


def spread(space: SearchSpace, vector: tuple[int, ...]) -> float:
    """The standard deviation of log(w / base)."""
    return float(np.std(np.log(np.array(vector) / space.base.vector)))


def test_balanced_widths_have_nearly_the_largest_sum_of_logs() -> None:
    """Of all networks within a budget; but they are nearer to the base's profile."""
    space = chain(32, 32, 32, 32)
    grid = np.array(list(itertools.product(range(4, 33, 2), repeat=4)))
    costs, sums = space.macs(grid), np.log(grid).mean(1)
    proposal, base = Balanced()(space, None, Setting()), space.cost(space.base).macs
    for share in (0.2, 0.35, 0.5):
        inside = np.flatnonzero(costs <= share * base)
        best = grid[inside[sums[inside].argmax()]]
        widths = scale_proposal(space, proposal, share * base).vector
        uniform = LinearFamily(space, space.base).solve(share * base).vector
        most, own, plain = (np.log(vector).mean() for vector in (best, widths, uniform))
        assert own > most - 0.4 * (most - plain), (share, best, widths)
        assert spread(space, widths) <= spread(space, tuple(best)) + 1e-9


def test_balanced_widths_of_a_plain_chain_do_not_alternate() -> None:
    """Without the pull, each second layer of the chain would lose nearly all of its MACs."""
    space = chain(*[32] * 8)
    removal, base = GreedyRemoval(space, per="macs"), np.full(8, 32)
    found = {}
    for pull in (0.0, PULL):
        removal = GreedyRemoval(space, per="macs")
        while space.macs(removal.widths) > 0.25 * space.macs(base):
            axis = removal.weakest(step_losses(removal.widths, base, np.full(8, 2), pull))
            assert axis is not None
            removal.remove(axis)
        found[pull] = removal.widths.copy()
    inner = {pull: widths[1:-1] for pull, widths in found.items()}
    assert max(inner[0.0]) >= 2.5 * min(inner[0.0])  # 8, 20, 14, 14, 20, 10
    assert max(inner[PULL]) < 2 * min(inner[PULL])  # 12, 18, 14, 14, 18, 10
    assert np.log(found[PULL]).mean() > np.log(found[0.0]).mean() - 0.04


def test_step_losses_by_hand() -> None:
    """log(w / (w - s)), weighted by the distance to the base's profile."""
    widths, base, steps = np.array([4, 8]), np.array([8, 8]), np.array([2, 2])
    plain = [math.log(2), math.log(8 / 6)]
    assert step_losses(widths, base, steps, 0.0) == pytest.approx(plain)
    half = 0.5 * math.log(2) / 2  # x is -log 2 and 0, its mean -log 2 / 2
    expected = [(1 + half) * plain[0], (1 - half) * plain[1]]
    assert step_losses(widths, base, steps, 0.5) == pytest.approx(expected)


def test_constant_scores_remove_the_dearest_channels() -> None:
    """Each step of the path is the one that saves most MACs a channel."""
    space = space_of("Residual")
    path = Constant(members=10**6)(space, None, Setting()).trajectory
    steps = np.array([axis.step for axis in space.axes])
    least = np.array([axis.min_width for axis in space.axes])
    for wide, narrow in itertools.pairwise(np.array([w.vector for w in path])):
        possible = wide - steps >= least
        saved = space.macs(wide) - space.macs(wide - np.diag(steps) * possible)
        rates = np.where(possible, saved / steps, -np.inf)
        assert (wide - narrow != 0).tolist() == (np.arange(len(steps)) == rates.argmax()).tolist()


@settings(max_examples=10, deadline=None)
@given(spaces)
def test_tapers_are_uniform_widths_times_a_curve(space: SearchSpace) -> None:
    """log(w / base) is linear in the number of the axis, up to the grid; slope 0 is uniform."""
    n, base = len(space.axes), np.array(space.base.vector)
    for slope in (0.0, *SLOPES):
        profile = Taper(slope=slope)(space, None, Setting()).profile
        assert profile is not None
        curve = np.exp(slope * np.linspace(-1, 1, n)) if n > 1 else np.ones(1)
        exact = base * curve / curve.max()
        for width, wanted, axis in zip(profile.vector, exact, space.axes, strict=True):
            assert width == axis.nearest(wanted)


def test_a_study_spreads_its_baselines() -> None:
    """Uniform at every budget first; then each other kind once, at different budgets."""
    space = space_of("Concatenated")
    budgets = [0.2, 0.35, 0.5, 0.65, 0.8]
    found = baseline_candidates({space.name: space}, budgets, 10, seed=0)
    kinds = [(c.origin["proposer"], c.origin.get("slope")) for c in found]
    assert kinds[:5] == [("uniform", None)] * 5
    assert set(kinds[5:]) <= {(k, None) for k in BASELINES} | {("taper", s) for s in SLOPES}
    assert len(set(kinds[5:])) == 5
    assert all(c.origin["baseline"] for c in found)
    base = space.cost(space.base).macs
    for c in found:
        assert space.cost(c.widths).macs <= c.origin["budget"] * base
    many = baseline_candidates({space.name: space}, budgets, 60, seed=0)
    counts = Counter(c.origin["proposer"] for c in many)
    assert set(counts) == set(BASELINES)
    assert len({c.widths for c in many}) == len(many) == 60
    assert counts["random"] > counts["balanced"]


def test_baselines_of_several_spaces() -> None:
    """Uniform in every space, or evenly spread if fewer are asked for; random ones by the seed."""
    spaces = {name: space_of(name) for name in ("Grouped", "Depthwise")}
    whole = baseline_candidates(spaces, [0.3, 0.6], 30, seed=0)
    assert [c.origin["proposer"] for c in whole[:4]] == ["uniform"] * 4
    assert len({(c.space, c.widths) for c in whole}) == 30
    assert whole == baseline_candidates(spaces, [0.3, 0.6], 30, seed=0)
    assert whole != baseline_candidates(spaces, [0.3, 0.6], 30, seed=1)
    few = baseline_candidates(spaces, [0.2, 0.3, 0.6], 2, seed=0)
    ends = [("Grouped", 0.2), ("Depthwise", 0.6)]
    assert [(c.space, c.origin["budget"]) for c in few] == ends
    assert baseline_candidates(spaces, [0.3], 0, seed=0) == []
