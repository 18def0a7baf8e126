"""Proposers: what every one promises, and what each is."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from strategies import MODELS, space_of

from widthsearch.channels import find_channels, gate_gradients
from widthsearch.data import Augmentation, Split, Task
from widthsearch.proposers import PROPOSERS, Proposal, Random, Sensitivity, Uniform
from widthsearch.proposers.sensitivity import balanced, remove_by_score


@cache
def small_task() -> Task:
    """Coloured 8×8 images of ten classes that a network can tell apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(200, dtype=np.int64) % 10
    images = rng.integers(0, 128, (200, 3, 8, 8), dtype=np.uint8)
    images += (labels * 12).astype(np.uint8)[:, None, None, None]
    half = Split(images[:100], labels[:100]), Split(images[100:], labels[100:])
    return Task(
        name="small",
        train=half[0],
        validation=half[1],
        test=None,
        classes=10,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augmentation=Augmentation(),
    )


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("method", sorted(PROPOSERS))
class TestConformance:
    """What every proposer promises, on every kind of network."""

    def test_it_stays_on_the_grid_and_never_widens(self, method: str, model: str) -> None:
        """Every member is of the space; the trajectory is monotone, from base or below."""
        space = space_of(model)
        proposal = PROPOSERS[method]()(space, small_task(), seed=0, device="cpu")
        path = np.array([space.widths(w).vector for w in proposal.trajectory])
        assert (np.diff(path, axis=0) <= 0).all()
        assert (np.diff(space.macs(path)) < 0).all()
        assert (path[0] <= space.base.vector).all()
        assert len(path) >= 4

    def test_it_is_deterministic_and_disturbs_nothing(self, method: str, model: str) -> None:
        """The same seed gives the same proposal; the global random state stays."""
        space, state = space_of(model), torch.get_rng_state()
        proposer = PROPOSERS[method]()
        a, b = (proposer(space, small_task(), seed=7, device="cpu") for _ in range(2))
        assert a == b
        assert torch.equal(state, torch.get_rng_state())

    def test_its_provenance_is_plain_json(self, method: str, model: str) -> None:
        """It survives a storage."""
        proposal = PROPOSERS[method]()(space_of(model), small_task(), seed=0, device="cpu")
        again = Proposal.from_json(json.loads(json.dumps(proposal.to_json())))
        assert again == proposal
        assert again.method == method


def test_random_depends_on_its_seed() -> None:
    """Two seeds, two profiles."""
    space, task = space_of("Residual"), small_task()
    a, b = (Random()(space, task, seed=s, device="cpu").trajectory for s in (0, 1))
    assert a != b


def test_uniform_scales_the_base() -> None:
    """Every member is a multiple of the base, snapped."""
    space = space_of("Residual")
    for widths in Uniform()(space, small_task(), seed=0, device="cpu").trajectory:
        shares = [w / a.base for w, a in zip(widths.vector, space.axes, strict=True)]
        assert max(shares) - min(shares) <= 0.125


def test_channels_go_by_saliency_per_mac() -> None:
    """By hand, on two axes: the step that loses the least for the MACs that it saves goes first."""
    space = space_of("Residual")  # stem 16 by 2, conv1 32 by 4
    saliency = [np.full(16, 1.0), np.full(32, 1.0)]
    macs = space.macs
    stem = 2.0 / float(macs([16, 32]) - macs([14, 32]))
    inner = 4.0 / float(macs([16, 32]) - macs([16, 28]))
    first = (14, 32) if stem < inner else (16, 28)
    path = remove_by_score(space, saliency, cost="recomputed", members=500)
    assert path[0] == space.base
    assert path[1].vector == first
    assert path[-1].vector == tuple(axis.least for axis in space.axes)
    # An axis that matters a million times more goes last.
    path = remove_by_score(space, [saliency[0] * 1e6, saliency[1]], cost="fixed", members=500)
    assert [w.vector[1] for w in path[:8]] == [32, 28, 24, 20, 16, 12, 8, 4]


def test_the_paper_keeps_the_initial_cost() -> None:
    """Fixed and recomputed costs are both offered, and differ."""
    space, task = space_of("Residual"), small_task()
    paths = [
        Sensitivity(cost=cost)(space, task, seed=0, device="cpu").trajectory
        for cost in ("fixed", "recomputed")
    ]
    assert paths[0] != paths[1]


def test_the_batch_has_every_class() -> None:
    """At least one sample a class, however small the batch."""
    labels = np.repeat(np.arange(10), 30)
    rng = np.random.default_rng(0)
    assert np.bincount(labels[balanced(labels, 10, 3, rng)]).tolist() == [1] * 10
    assert np.bincount(labels[balanced(labels, 10, 64, rng)]).tolist() == [6] * 10


def test_dead_channels_go_first() -> None:
    """Channels whose readers ignore them have no saliency."""
    space = space_of("Residual")
    model = space.build(space.base, seed=0)
    with torch.no_grad():
        model.conv2.weight[:, :12] = 0
    x = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(model(x), torch.arange(20) % 10).backward()
    inner = gate_gradients(find_channels(space, space.base), model)[1]
    assert not bool(inner[:12].any())
    assert bool((inner[12:] != 0).all())


def test_tied_axes_lose_what_matters_least_in_each() -> None:
    """The saliency of a tied axis is that of its axes, channel by channel in order of saliency."""
    whole, task = space_of("Grouped"), small_task()
    tied = whole.constrained(tie=[["stem", "last"]])
    own = Sensitivity().saliency(whole, task, seed=0, device="cpu")
    joined = Sensitivity().saliency(tied, task, seed=0, device="cpu")
    assert [len(s) for s in joined] == [16, 24]
    assert joined[0].sum() == pytest.approx(own[0].sum() + own[2].sum())
    assert (np.diff(joined[0]) >= 0).all()
    assert (joined[1] == own[1]).all()
    proposal = Sensitivity()(tied, task, seed=0, device="cpu")
    assert all(tied.widths(w) == w for w in proposal.trajectory)
