"""Network slimming: sparse training and the scores of channels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conformance import RECIPE, ProposerConformance, setting, small_task
from strategies import network_of, space_of
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.proposers import slimming
from widthsearch.proposers.slimming import (
    Slimming,
    first_sparsity,
    norm_scales,
    penalise,
    polarisation,
)


class TestSlimming(ProposerConformance):
    """Two epochs, at most twice."""

    method = "slimming"
    proposer = Slimming(trainings=2)


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


def test_the_penalty_by_hand() -> None:
    """λ·sign(γ) and weight decay are added to the gradient of γ."""
    scale = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.0]))
    scale.grad = torch.tensor([1.0, 1.0, 1.0])
    penalise([scale], 0.25, 0.125)
    assert scale.grad.tolist() == [1.5, 0.625, 1.0]


def test_scales_without_a_gradient_remain() -> None:
    """A frozen norm is not trained."""
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    penalise([frozen], 0.25, 0.125)
    assert frozen.grad is None


def test_polarisation_by_hand() -> None:
    """Of 64 scales, those below a tenth of the largest; without norms there is none."""
    _, model, _ = network_of("Residual")
    for norm in (model.bn, model.bn1, model.bn2):
        nn.init.ones_(norm.weight)
    assert polarisation(model) == 0
    with torch.no_grad():
        model.bn.weight[:8] = 0.19
        model.bn.weight[8] = -2.0
    assert polarisation(model) == 8 / 64
    assert polarisation(network_of("Plain")[1]) == 0


@pytest.mark.parametrize(("momentum", "error"), [(0.0, 1e-6), (0.9, 0.06)])
def test_the_first_sparsity_can_take_a_scale_to_zero(momentum: float, error: float) -> None:
    """A γ that only the penalty moves goes from 0.5 to zero in the training, and not much below."""
    task = small_task()
    recipe = replace(RECIPE, epochs=50, momentum=momentum, nesterov=False)
    sparsity = first_sparsity(recipe, task)
    scale = torch.nn.Parameter(torch.tensor([0.5]))
    optimizer = torch.optim.SGD([scale], lr=0.0, momentum=recipe.momentum)
    for step in range(2 * recipe.epochs):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate(step, 2)
        scale.grad = torch.full_like(scale, sparsity)
        optimizer.step()
    assert scale.item() == pytest.approx(0, abs=error)
    assert first_sparsity(replace(recipe, epochs=2 * 10**5), task) == 1e-4  # the paper's


def test_sparsity_rises_until_the_scales_are_polarised() -> None:
    """Threefold a training; the last one is ranked, and a warning names the share."""
    space, task = space_of("Residual"), small_task()
    recipe = replace(RECIPE, epochs=4)
    method = Slimming(recipe=recipe, polarised=0.5, trainings=3)
    trained = method(space, task, setting()).provenance["trained"]
    ratios = [b["sparsity"] / a["sparsity"] for a, b in itertools.pairwise(trained)]
    assert trained[0]["sparsity"] == first_sparsity(recipe, task)
    assert ratios == pytest.approx([3.0] * len(ratios))
    assert all(each["polarisation"] < 0.5 for each in trained[:-1])
    assert 0 <= trained[-1]["accuracy"] <= 100
    easy = replace(method, polarised=trained[0]["polarisation"])(space, task, setting())
    assert len(easy.provenance["trained"]) == 1
    assert easy.warnings == []
    (line,) = replace(method, polarised=1.0)(space, task, setting()).warnings
    assert "not 100%, so that their order means little" in line
    (fixed,) = Slimming(sparsity=1e-4)(space, task, setting()).provenance["trained"]
    assert fixed["sparsity"] == 1e-4
    assert fixed["polarisation"] == 0  # moves no scale of a short training


def test_scales_start_at_one_half_and_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of their initial values; the penalty takes them towards zero."""
    means = []

    def spy(graph: DependencyGraph, model: nn.Module) -> list[Tensor]:
        means.append(model.bn1.weight.detach().abs().mean().item())
        return norm_scales(graph, model)

    monkeypatch.setattr(slimming, "norm_scales", spy)
    for sparsity in (0.0, 0.5):
        Slimming(sparsity=sparsity)(space_of("Residual"), small_task(), setting())
    assert means[0] == pytest.approx(0.5, abs=0.05)
    assert means[1] < 0.9 * means[0]


def test_it_trains_by_its_own_recipe_and_reports_it() -> None:
    """By default it uses the study's recipe."""
    space, task = space_of("Residual"), small_task()
    lines: list[str] = []
    own = Slimming(sparsity=0.1, recipe=RECIPE)
    proposal = own(space, task, replace(setting(), report=lines.append))
    assert [line.split(",")[0] for line in lines] == ["base: epoch 1 of 2", "base: epoch 2 of 2"]
    by_default = replace(own, recipe=None)(space, task, setting())
    assert proposal.trajectory == by_default.trajectory
