"""NASWOT: the kernel of binary codes, and hill climbing within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conformance import ProposerConformance, setting, small_task
from exact_space import Model
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from strategies import space_of, spaces
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.data.tasks import OwnTask
from widthsearch.errors import StudyError
from widthsearch.proposers.naswot import Naswot, activation_score, climb, move


class TestNaswot(ProposerConformance):
    """Three sizes of four networks."""

    method = "naswot"
    proposer = Naswot(batch_size=10, candidates=4, members=3)


def literal_kernel(codes: list[Tensor]) -> np.ndarray:
    """N_A - d_H for each pair of images, unit by unit, from codes (images, units) of layers."""
    whole = torch.cat(codes, 1).int().tolist()
    kernel = np.zeros((len(whole), len(whole)))
    for i, j in itertools.product(range(len(whole)), repeat=2):
        distance = sum(a != b for a, b in zip(whole[i], whole[j], strict=True))
        kernel[i, j] = len(whole[0]) - distance
    return kernel


class Mixed(nn.Module):
    """ReLU as a module and as a function, in place, and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.third, self.fc = nn.Linear(5, 6), nn.Linear(6, 10)
        self.relu = nn.ReLU(inplace=True)
        self.codes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        for layer, activation in ((self.first, self.relu), (self.second, F.relu)):
            x = layer(x)
            self.codes.append((x.detach() > 0).flatten(1))
            x = activation(x)
        x = self.third(x.mean((2, 3)))
        self.codes.append((x.detach() > 0).flatten(1))
        return self.fc(F.gelu(x))


def test_the_score_equals_a_literal_count() -> None:
    """log det of the number of units that agree, over all activations."""
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(6, 3, 8, 8)
    found = activation_score(model, small_task(), (x, torch.arange(6)))
    model.codes.clear()
    model(x)
    expected = np.linalg.slogdet(literal_kernel(model.codes))[1]
    assert found == pytest.approx(expected, rel=1e-9)
    twins = x.clone()
    twins[1] = twins[0]
    assert activation_score(model, small_task(), (twins, torch.arange(6))) < expected - 5


def test_rows_of_several_tokens_belong_to_their_image() -> None:
    """An activation on (images · tokens, units) counts as (images, tokens · units)."""
    torch.manual_seed(0)
    fc = nn.Linear(3, 4)
    model = Model(lambda m, x: F.silu(m.fc(x.flatten(0, 1))), fc=fc)
    task = OwnTask(lambda net, x: net(x).mean(), lambda split, seed: [])
    x = torch.randn(4, 5, 3)
    expected = np.linalg.slogdet(literal_kernel([(fc(x) > 0).flatten(1)]))[1]
    assert activation_score(model, task, x) == pytest.approx(expected)


def test_a_network_without_activations_is_refused() -> None:
    """With the way out."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(StudyError, match=r"signs of activations .*; use `sensitivity`"):
        activation_score(net, small_task(), (torch.randn(4, 3, 8, 8), torch.arange(4)))


@limits(max_examples=25, deadline=None)
@given(spaces, st.integers(0, 99), st.floats(0.3, 0.9))
def test_moves_stay_within_the_budget(space: Any, seed: int, share: float) -> None:
    """On the grid, not wider than allowed; one axis narrows, at most one other widens."""
    rng, most = np.random.default_rng(seed), np.array(space.base.vector)
    budget = share * space.cost(space.base).macs
    widths = np.array(space.widths([axis.min_width for axis in space.axes]).vector)
    for _ in range(5):
        moved = move(space, widths, most, budget, rng)
        if moved is not None:
            assert space.widths(moved.tolist()).vector == tuple(moved.tolist())
            assert space.macs(moved) <= budget
            assert (moved <= most).all()
            assert (moved < widths).sum() == 1
            assert (moved > widths).sum() <= 1
            widths = moved


def test_climbing_finds_what_the_score_wants() -> None:
    """By a score that favours one axis; so many networks are scored, and the best is kept."""
    space = space_of("Plain")
    most = np.array(space.base.vector)
    budget = 0.5 * space.cost(space.base).macs
    start = np.array(space.widths(0.5).vector)
    scored: list[tuple[int, ...]] = []

    def favouring(axis: int) -> Callable[[Any], float]:
        def score(vector: Any) -> float:
            scored.append(tuple(vector.tolist()))
            return float(vector[axis])

        return score

    for axis in range(2):
        scored.clear()
        rng = np.random.default_rng(0)
        found, first, best = climb(space, start, most, budget, favouring(axis), 12, rng)
        assert len(scored) == len(set(scored)) <= 12
        assert first == start[axis] < best == found[axis] == max(v[axis] for v in scored)
        assert space.macs(found) <= budget


def test_each_size_is_within_its_budget_and_scores_rise() -> None:
    """From the base to the lowest of interest."""
    space = space_of("Residual")
    proposal = Naswot(batch_size=10, candidates=12, members=3)(space, small_task(), setting())
    macs = space.macs([widths.vector for widths in proposal.trajectory])
    base = space.cost(space.base).macs
    assert macs[0] == base
    assert macs[1] <= base * 0.3**0.5
    assert macs[2] <= base * 0.3
    assert all(best >= first for first, best in proposal.provenance["scores"])
