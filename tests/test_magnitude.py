"""Prune-and-tune by magnitude: the norms of filters."""

from __future__ import annotations

import pytest
import torch
from conformance import ProposerConformance, setting, small_task
from strategies import network_of, space_of

from widthsearch.proposers.magnitude import Magnitude, filter_norms


class TestMagnitude(ProposerConformance):
    """Two steps for each network on the way."""

    method = "magnitude"
    proposer = Magnitude(every=2)


def test_norms_by_hand() -> None:
    """Absolute values: a filter of large negative weights is not a small one."""
    _, model, graph = network_of("Plain")
    with torch.no_grad():
        model.conv1.weight.fill_(0.1)
        model.conv1.weight[3] = -2.0  # its plain sum would be the smallest
        model.conv1.weight[5] = 0.01
        model.conv1.weight[5, 0, 0, 0] = -0.8
    l1, l2 = (filter_norms(graph, model, norm)[0] for norm in ("l1", "l2"))
    assert l1.tolist() == pytest.approx([2.7, 2.7, 2.7, 54.0, 2.7, 1.06, 2.7, 2.7])
    assert l2[5].item() == pytest.approx((26 * 0.01**2 + 0.64) ** 0.5)
    assert l2[3].item() == pytest.approx((27 * 4) ** 0.5)
    assert int(l1.argmin()) == 5
    assert int(l2.argmin()) != 5, "the two norms rank differently"


def test_every_layer_that_is_added_to_a_stream_makes_it() -> None:
    """Consumers do not make it, and biases and norms are no filters."""
    _, model, graph = network_of("Residual")
    stem, inner = filter_norms(graph, model, "l1")
    made = (model.stem.weight, model.conv2.weight)
    assert torch.allclose(stem, sum(w.detach().abs().sum((1, 2, 3)) for w in made))
    assert torch.allclose(inner, model.conv1.weight.detach().abs().sum((1, 2, 3)))


def test_a_depthwise_filter_belongs_to_its_channel() -> None:
    """The expansion and the depthwise filter both make the channel."""
    _, model, graph = network_of("Depthwise")
    found = filter_norms(graph, model, "l1")[1]
    made = (model.expand.weight, model.depthwise.weight)
    assert torch.allclose(found, sum(w.detach().abs().sum((1, 2, 3)) for w in made))


def test_groups_of_channels_add_their_filters() -> None:
    """Channel 0 of each of the four convolution groups is one group."""
    _, model, graph = network_of("Grouped")
    found = filter_norms(graph, model, "l1")[0]
    of_channel = model.stem.weight.detach().abs().sum((1, 2, 3))
    assert torch.allclose(found, of_channel.view(4, 4).sum(0))


def test_the_norms_give_different_paths() -> None:
    """The trajectories by L1 and L2 norm differ."""
    space, task = space_of("Residual"), small_task()
    paths = {Magnitude(norm=n, every=1)(space, task, setting()).trajectory for n in ("l1", "l2")}
    assert len(paths) == 2
