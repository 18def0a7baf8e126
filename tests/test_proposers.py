"""Proposers: what every one promises, and what each is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import ProposerConformance, small_task
from strategies import space_of

from widthsearch.channels import find_channels, gate_gradients
from widthsearch.proposers import PROPOSERS, Random, Sensitivity, Setting, Uniform
from widthsearch.proposers.sensitivity import balanced, remove_by_score


class TestSensitivity(ProposerConformance):
    """One batch, one backward pass."""

    method = "sensitivity"
    proposer = Sensitivity()


class TestUniform(ProposerConformance):
    """The baseline."""

    method = "uniform"
    proposer = Uniform()


class TestRandom(ProposerConformance):
    """The other one."""

    method = "random"
    proposer = Random()


def test_every_method_conforms() -> None:
    """Each name of the mapping has a subclass of the conformance test."""
    files = Path(__file__).parent.glob("test_*.py")
    tested = re.findall(r'^    method = "(\w+)"$', "".join(f.read_text() for f in files), re.M)
    assert sorted(tested) == sorted(PROPOSERS)


def test_random_depends_on_its_seed() -> None:
    """Two seeds, two profiles."""
    space, task = space_of("Residual"), small_task()
    a, b = (Random()(space, task, Setting(seed=s)).trajectory for s in (0, 1))
    assert a != b


def test_uniform_scales_the_base() -> None:
    """Every member is a multiple of the base, snapped."""
    space = space_of("Residual")
    for widths in Uniform()(space, small_task(), Setting(seed=0)).trajectory:
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
        Sensitivity(cost=cost)(space, task, Setting(seed=0)).trajectory
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
    own = Sensitivity().saliency(whole, task, Setting(seed=0))
    joined = Sensitivity().saliency(tied, task, Setting(seed=0))
    assert [len(s) for s in joined] == [16, 24]
    assert joined[0].sum() == pytest.approx(own[0].sum() + own[2].sum())
    assert (np.diff(joined[0]) >= 0).all()
    assert (joined[1] == own[1]).all()
    proposal = Sensitivity()(tied, task, Setting(seed=0))
    assert all(tied.widths(w) == w for w in proposal.trajectory)
