"""Sensitivity at initialisation: saliency and greedy removal."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conformance import ProposerConformance, small_task
from gating import gated, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEARCH_SPACES, graph_of, network_of, space_of, spaces
from torch import Tensor
from torch.nn import functional as F

from widthsearch.channels.sums import gate_gradients
from widthsearch.data.loaders import DeviceLoader
from widthsearch.data.sources import Split
from widthsearch.data.tasks import OwnTask
from widthsearch.errors import StudyError
from widthsearch.proposers import Setting
from widthsearch.proposers.importance import GreedyRemoval, Per, channel_scores
from widthsearch.proposers.sensitivity import Sensitivity, balanced
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.references import load_function

densenet: Any = load_function(f"{SEARCH_SPACES / 'densenet.py'}:densenet")


class TestSensitivity(ProposerConformance):
    """One batch, one backward pass."""

    method = "sensitivity"
    proposer = Sensitivity()


def drawn(rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch that has every class."""
    task = small_task()
    index = balanced(task.train.labels, task.classes, size, rng)
    batch = Split(task.train.images[index], task.train.labels[index])
    return DeviceLoader(batch, task, len(batch)).plain()


def path_of(space: SearchSpace, scores: list[NDArray[np.float64]], **options: object) -> list[list]:
    """Every width vector of the greedy path."""
    removal = GreedyRemoval(space, **{"per": "macs", **options})  # type: ignore[arg-type]
    removal.remove_lowest(scores)
    return [widths.tolist() for widths in removal.path]


@pytest.mark.parametrize(
    "space",
    [
        space_of("Residual"),
        densenet(10, 4, bottleneck=True),
        densenet(7, 4, bottleneck=False),
        SearchSpace.from_model(tokens, (3, 8, 8)),
    ],
    ids=["residual", "densenet_bc", "densenet", "tokens"],
)
def test_saliency_equals_that_of_explicit_gates(space: SearchSpace) -> None:
    """|∂L/∂c| of gates in residual, dense and token networks, by autograd to 1e-5."""
    saliency = Sensitivity(batch_size=40).saliency(space, small_task(), Setting(seed=3))
    model = space.build(space.base, seed=3).double()
    gates = gated(space, model)
    x, y = drawn(np.random.default_rng(3), 40)
    F.cross_entropy(model(x.double()), y).backward()
    for gate, found in zip(gates, saliency, strict=True):
        assert gate.grad is not None
        expected = gate.grad.abs().numpy()
        assert expected.max() > 1e-4
        assert np.abs(found - expected).max() < 1e-5 * expected.max() + 1e-6


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net, batch: net(batch).mean() * float("nan"), "scores of channels must be finite"),
        (lambda net, batch: batch.mean().requires_grad_(), "must have a score above zero"),
    ],
    ids=["nan", "without the network"],
)
def test_a_loss_without_a_gradient_is_refused(loss: Any, message: str) -> None:
    """Its widths would be nobody's proposal."""
    task = OwnTask(loss, lambda split, seed: [torch.ones(2, 3, 32, 32)])
    with pytest.raises(StudyError, match=message):
        Sensitivity()(space_of("Residual"), task, Setting())


def test_the_gates_of_several_batches_keep_their_signs() -> None:
    """The saliency of two batches is the absolute value of the mean of their signed gradients."""
    space, model, graph = network_of("Residual")
    found = Sensitivity(batch_size=10, batches=2).saliency(space, small_task(), Setting(seed=0))
    rng = np.random.default_rng(0)
    signed = []
    for _ in range(2):
        x, y = drawn(rng, 10)
        signed.append(gate_gradients(graph, model, lambda x=x, y=y: F.cross_entropy(model(x), y)))
    for of_axis, first, second in zip(found, *signed, strict=True):
        assert np.allclose(of_axis, ((first + second) / 2).abs(), rtol=1e-4, atol=1e-7)
    assert any((a * b < 0).any() for a, b in zip(*signed, strict=True)), "some signs differ"


def test_channels_are_removed_by_saliency_per_mac() -> None:
    """By hand on two axes: the first step has the least loss per MAC that it saves."""
    space = space_of("Residual")  # stem 16 by 2, conv1 32 by 4
    saliency = [np.full(16, 1.0), np.full(32, 1.0)]
    whole, *narrower = space.macs([[16, 32], [14, 32], [16, 28]]).tolist()
    stem, inner = 2.0 / (whole - narrower[0]), 4.0 / (whole - narrower[1])
    first = [14, 32] if stem < inner else [16, 28]
    path = path_of(space, saliency)
    assert path[:2] == [list(space.base.vector), first]
    assert path[-1] == [axis.min_width for axis in space.axes]
    # An axis with a million times the saliency is removed last.
    path = path_of(space, [saliency[0] * 1e6, saliency[1]], cost="fixed")
    assert [w[1] for w in path[:8]] == [32, 28, 24, 20, 16, 12, 8, 4]


@settings(max_examples=25, deadline=None)
@given(spaces, st.sampled_from(["channel", "macs", "params", "latency"]), st.integers(0, 99))
def test_the_path_is_greedy(space: SearchSpace, per: Per, seed: int) -> None:
    """Each step is the best by brute force, from whole costs and whole sums of scores."""
    rng = np.random.default_rng(seed)
    scores = [rng.random(axis.base) for axis in space.axes]
    weights = rng.random(len(space.axes))

    def latency(widths: NDArray[np.int64]) -> NDArray[np.float64]:
        return 1 + widths @ weights + 1e-3 * widths.prod(1)

    def quantity(widths: NDArray[np.int64]) -> float:
        if per == "channel":
            return float(widths.sum())
        return float(latency(widths[None])[0] if per == "latency" else space.cost_form(per)(widths))

    path = [np.array(w) for w in path_of(space, scores, per=per, latency=latency)]
    for before, after in itertools.pairwise(path):
        worth = {}
        for i, axis in enumerate(space.axes):
            narrower = before.copy()
            narrower[i] -= axis.step
            if narrower[i] >= axis.min_width:
                gone = axis.base - before[i]
                lost = np.sort(scores[i])[gone : gone + axis.step].sum()
                worth[i] = lost / (quantity(before) - quantity(narrower))
        chosen = int(np.flatnonzero(before != after).item())
        assert worth[chosen] == pytest.approx(min(worth.values()))


def test_the_cost_that_scores_are_divided_by_changes_the_order() -> None:
    """MACs, parameters, channels, latency and the paper's fixed cost give different paths."""
    space, task = space_of("Concatenated"), small_task()
    setting = Setting(seed=0, latency=lambda w: 1.0 + w[:, 0] + 0.01 * w[:, 1] + 0.1 * w[:, 2])
    methods = [Sensitivity(per=p) for p in ("macs", "params", "channel", "latency")]
    methods.append(Sensitivity(cost="fixed"))
    paths = {method(space, task, setting).trajectory for method in methods}
    assert len(paths) == len(methods)


def test_latency_is_predicted_for_all_steps_at_once() -> None:
    """One call per removal: the widths reached so far, and each axis one step narrower."""
    space = space_of("Residual")
    asked = []

    def latency(widths: NDArray[np.int64]) -> NDArray[np.float64]:
        asked.append(widths.copy())
        return widths.sum(1).astype(np.float64)

    removal = GreedyRemoval(space, per="latency", latency=latency)
    removal.weakest(np.ones(2))
    assert [a.tolist() for a in asked] == [[[16, 32], [14, 32], [16, 28]]]


def test_steps_without_a_saving_are_removed_last() -> None:
    """An axis that predicted latency does not depend on is narrowed after the other one."""
    space = space_of("Residual")
    ones = [np.ones(16), np.ones(32)]
    path = path_of(space, ones, per="latency", latency=lambda w: 1.0 + w[:, 0])
    assert [w[0] for w in path[:8]] == [16, 14, 12, 10, 8, 6, 4, 2]
    assert path[-1] == [2, 4]


@given(floor=st.floats(0, 1))
def test_no_axis_goes_below_the_floor(floor: float) -> None:
    """Each axis ends at the floor, not a step above it."""
    space = space_of("Residual")
    removal = GreedyRemoval(space, per="macs", floor=floor)
    removal.remove_lowest([np.ones(16), np.ones(32)])
    for width, axis in zip(removal.path[-1], space.axes, strict=True):
        assert width >= floor * axis.base - 1e-6
        assert width == axis.min_width or width - axis.step < floor * axis.base


def test_channels_that_cannot_be_told_apart_are_scored_as_a_whole() -> None:
    """All channels of such an axis have its mean saliency."""
    space = space_of("Residual")
    graph = replace(graph_of(space), unknown=frozenset({0}))
    shared, own = channel_scores(space, graph, [torch.arange(16.0), torch.arange(32.0)])
    assert shared.tolist() == [7.5] * 16
    assert own.tolist() == list(range(32))


def test_the_batch_has_every_class() -> None:
    """At least one sample per class, however small the batch."""
    labels = np.repeat(np.arange(10), 30)
    rng = np.random.default_rng(0)
    assert np.bincount(labels[balanced(labels, 10, 3, rng)]).tolist() == [1] * 10
    assert np.bincount(labels[balanced(labels, 10, 64, rng)]).tolist() == [6] * 10


def test_dead_channels_have_no_saliency() -> None:
    """Channels that all consumers multiply by zero."""
    _, model, graph = network_of("Residual")
    with torch.no_grad():
        model.conv2.weight[:, :12] = 0
    x, y = drawn(np.random.default_rng(0), 20)
    _, inner = gate_gradients(graph, model, lambda: F.cross_entropy(model(x), y))
    assert not bool(inner[:12].any())
    assert bool((inner[12:] != 0).all())


def test_tied_axes_add_the_saliency_of_their_channels_by_rank() -> None:
    """The least salient channels of each tied axis are removed together."""
    whole, task = space_of("Grouped"), small_task()
    tied = whole.constrained(tie=[["stem", "last"]])
    own = Sensitivity().saliency(whole, task, Setting(seed=0))
    joined = Sensitivity().saliency(tied, task, Setting(seed=0))
    assert [len(s) for s in joined] == [16, 24]
    assert joined[0].sum() == pytest.approx(own[0].sum() + own[2].sum())
    assert (np.diff(joined[0]) >= 0).all()
    assert (joined[1] == own[1]).all()
    proposal = Sensitivity()(tied, task, Setting(seed=0))
    assert all(tied.widths(w.vector) == w for w in proposal.trajectory)
