"""Network slimming: sparse training and the scores of channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conformance import RECIPE, ProposerConformance, setting, small_task
from strategies import network_of, space_of
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.proposers import slimming
from widthsearch.proposers.slimming import Slimming, norm_scales


class TestSlimming(ProposerConformance):
    """Two epochs."""

    method = "slimming"
    proposer = Slimming()


def test_scales_are_absolute_and_averaged_over_norms() -> None:
    """Channels of the stream pass two norms, inner channels one."""
    _, model, graph = network_of("Residual")
    with torch.no_grad():
        model.bn.weight.copy_(torch.arange(16.0) - 8)
        model.bn2.weight.fill_(2.0)
        model.bn1.weight.fill_(-0.5)
    stream, inner = norm_scales(graph, model)
    assert stream.tolist() == [(abs(i - 8) + 2) / 2 for i in range(16)]
    assert inner.tolist() == [0.5] * 32


def test_a_norm_of_a_concatenation_scores_both_parts() -> None:
    """Each part has scales of its own; an axis without norms is ranked by its filters."""
    _, model, graph = network_of("Concatenated")
    with torch.no_grad():
        model.bn.weight.copy_(torch.arange(12.0))
        model.last.weight.fill_(1.0)
        model.last.weight[3] = -3.0
    stem, grow, last = norm_scales(graph, model)
    assert stem.tolist() == list(range(8))
    assert grow.tolist() == list(range(8, 12))
    # Mean |γ| is 5.5; fifteen filters of 1 and one of 3 have a mean of 18/16.
    assert last.tolist() == pytest.approx([5.5 / 1.125] * 3 + [16.5 / 1.125] + [5.5 / 1.125] * 12)


def test_without_norms_channels_are_ranked_by_their_filters() -> None:
    """The mean score of each axis is 1."""
    _, model, graph = network_of("Plain")
    for scores in norm_scales(graph, model):
        assert scores.mean().item() == pytest.approx(1)
        assert scores.std().item() > 0


def test_groups_of_channels_add_their_scores() -> None:
    """A group of four channels has four times the score of a channel, on average 1."""
    _, model, graph = network_of("Grouped")
    scores = norm_scales(graph, model)
    assert [round(float(s.mean()), 5) for s in scores] == [4.0, 4.0, 1.0]


def test_sparsity_shrinks_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty adds λ·sign(γ) to the gradient of γ, and training with it shrinks |γ|."""
    scale = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.0]))
    scale.grad = torch.tensor([1.0, 1.0, 1.0])
    Slimming(sparsity=0.25).penalise([scale])
    assert scale.grad.tolist() == [1.25, 0.75, 1.0]
    means = []

    def spy(graph: DependencyGraph, model: nn.Module) -> list[Tensor]:
        means.append(model.bn1.weight.detach().abs().mean().item())
        return norm_scales(graph, model)

    monkeypatch.setattr(slimming, "norm_scales", spy)
    for sparsity in (0.0, 0.5):
        Slimming(sparsity=sparsity)(space_of("Residual"), small_task(), setting())
    assert means[1] < 0.9 * means[0]


def test_it_trains_by_its_own_recipe_and_reports_its_accuracy() -> None:
    """By default it uses the study's recipe."""
    space, task = space_of("Residual"), small_task()
    lines: list[str] = []
    own = Slimming(recipe=RECIPE)
    proposal = own(space, task, replace(setting(), report=lines.append))
    assert [line.split(",")[0] for line in lines] == ["base: epoch 1 of 2", "base: epoch 2 of 2"]
    assert 0 <= proposal.provenance["accuracy"] <= 100
    assert own(space, task, setting()).trajectory == Slimming()(space, task, setting()).trajectory
