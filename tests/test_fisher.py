"""Fisher pruning, and the prune-and-tune loop that it shares with magnitude pruning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance import RECIPE, ProposerConformance, setting, small_task
from exact_space import Model
from gating import gated, tokens
from random_networks import CONVOLUTIONS, Network
from strategies import MODELS, SEARCH_SPACES, graph_of, network_of, space_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels.sums import gate_gradients
from widthsearch.errors import SpaceError
from widthsearch.proposers import Setting
from widthsearch.proposers.fisher import Fisher, FisherInformation
from widthsearch.proposers.importance import GreedyRemoval
from widthsearch.proposers.magnitude import Magnitude
from widthsearch.proposers.tuning import FineTuner, PruneAndTune
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.trainer import fit
from widthsearch.utils.references import load_function

resnet: Any = load_function(f"{SEARCH_SPACES / 'resnet_cifar.py'}:resnet")


class TestFisher(ProposerConformance):
    """Two steps for each network on the way."""

    method = "fisher"
    proposer = Fisher(every=2)


def batch(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 8, 8) and labels of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.arange(images) % 10


@pytest.mark.parametrize("name", sorted(MODELS))
def test_delta_equals_that_of_explicit_gates(name: str) -> None:
    """Δ over two batches of different sizes, by autograd of one gate per image, to 1e-5."""
    space, model, graph = network_of(name, seed=1)
    model.double()
    sums = [0.0] * len(space.axes)
    with FisherInformation(graph, model) as information:
        for count in (12, 20):
            x, y = batch(count, seed=count)
            F.cross_entropy(model(x), y).backward()
            information.gather(count)
    for count in (12, 20):
        explicit = space.build(space.base, seed=1).double()
        gates = gated(space, explicit, count)
        x, y = batch(count, seed=count)
        F.cross_entropy(explicit(x), y, reduction="sum").backward()
        sums = [s + g.grad.square().sum(0) for s, g in zip(sums, gates, strict=True)]
    for found, expected in zip(information.deltas(), sums, strict=True):
        assert torch.allclose(found, expected / (2 * 32), rtol=1e-5)
        assert bool((found > 0).any())


def test_gate_gradients_of_images_add_up() -> None:
    """Their sum, before it is squared, is the gradient of a gate that all images share."""
    _, model, graph = network_of("Residual", seed=1)
    model.double().eval()
    x, y = batch(1, seed=0)
    with FisherInformation(graph, model) as information:
        F.cross_entropy(model(x), y).backward()
        information.gather(1)
    gates = gate_gradients(graph, model, lambda: F.cross_entropy(model(x), y))
    for delta, gate in zip(information.deltas(), gates, strict=True):
        assert torch.allclose(delta, gate.double().square() / 2, rtol=1e-5)


def test_gathering_does_not_change_the_network() -> None:
    """Gradients are the same with and without it, and evaluation is not gathered."""
    space, model, graph = network_of("Depthwise", seed=1)
    plain = space.build(space.base, seed=1).double()
    x, y = batch(8, seed=0)
    F.cross_entropy(plain(x), y).backward()
    with FisherInformation(graph, model.double()) as information:
        F.cross_entropy(model(x), y).backward()
        before = len(information._gradients)
        with torch.no_grad():
            model(x)
        assert len(information._gradients) == before
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_windows_of_an_image_share_its_gate() -> None:
    """A consumer with four rows per image: the gate of the image has the sum of all four."""
    space = SearchSpace.from_model(tokens, (3, 8, 8))
    model = space.build(space.base, seed=0).double()
    x, y = batch(6, seed=0)
    graph, embed = graph_of(space), space.names.index("embed")
    with FisherInformation(graph, model) as information:
        F.cross_entropy(model(x), y).backward()
        information.gather(6)
    expected = torch.zeros(8, dtype=torch.float64)
    for one in zip(x.split(1), y.split(1), strict=True):
        gates = gate_gradients(graph, model, lambda of=one: F.cross_entropy(model(of[0]), of[1]))
        expected += gates[embed].double().square() / 12
    assert torch.allclose(information.deltas()[embed], expected, rtol=1e-5)


@pytest.mark.parametrize("convolution", sorted(CONVOLUTIONS))
def test_consumers_with_computed_weights_are_seen(convolution: str) -> None:
    """Δ of one image is half the squared gradient of its gate, also through a weight norm."""
    space = SearchSpace.from_model(lambda: Network(convolution, ["convolution"]), (3, 6, 6))
    model, graph = space.build(space.base, seed=0).double().eval(), graph_of(space)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with FisherInformation(graph, model) as information:
        model(x).square().sum().backward()
        information.gather(1)
    gates = gate_gradients(graph, model, lambda: model(x).square().sum())
    for delta, gate in zip(information.deltas(), gates, strict=True):
        assert bool((delta > 0).any()) and torch.allclose(delta, gate.square() / 2, rtol=1e-5)


def product() -> nn.Module:
    """A network whose last weight is multiplied without a layer."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.conv(F.relu(m.stem(x)))).mean((2, 3)) @ m.weight

    stem, conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    return Model(forward, stem=stem, conv=conv, weight=nn.Parameter(torch.randn(8, 10)))


def test_axes_with_unknown_consumers_keep_their_width() -> None:
    """Their information is unknown, so that only the others are narrowed."""
    space = SearchSpace.from_model(product, (3, 8, 8))
    proposal = Fisher(every=1)(space, small_task(), setting())
    assert {w["weight"] for w in proposal.trajectory} == {8}
    assert proposal.trajectory[-1]["stem"] < 8


# -- prune-and-tune ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Scripted(PruneAndTune):
    """Scores by a function; single steps hardly change the weights."""

    scores: Callable[[FineTuner], list[Tensor]] = lambda _: []
    every: int = 1
    lr: float = 1e-9
    name: ClassVar[str] = "scripted"

    def score(self, tuner: FineTuner) -> list[Tensor]:
        """The scores of the function."""
        return self.scores(tuner)


def test_every_member_is_measured() -> None:
    """Each has exact MACs, tuned accuracy and training so far; the path ends at `lowest`."""
    space, task = space_of("Residual"), small_task()
    proposal = Fisher(every=3)(space, task, setting())
    members = proposal.provenance["members"]
    base = space.cost(space.base).macs
    assert [m["macs"] for m in members] == [space.cost(w).macs for w in proposal.trajectory]
    assert proposal.trajectory[0] == space.base
    assert members[-1]["macs"] <= 0.3 * base < members[-2]["macs"]
    assert all(0 <= m["accuracy"] <= 100 for m in members)
    # Two epochs of the base, then three steps of 50 of the 100 images for each member.
    spent = 2 + np.cumsum([1.5 * m["macs"] / base for m in members])
    assert [m["epochs"] for m in members] == pytest.approx(spent.tolist())


def test_networks_on_the_way_are_real_narrower_networks() -> None:
    """A scored network has the sizes of its member and the weights of the channels left."""
    space, task = space_of("Residual"), small_task()
    seen: list[tuple[int, int]] = []
    weights: list[Tensor] = []

    def score(tuner: FineTuner) -> list[Tensor]:
        tuner.tune()
        net: Any = tuner.model
        seen.append((net.stem.out_channels, net.conv1.out_channels))
        weights.append(net.conv1.weight.detach().clone())
        # First the lowest scores are those of two stem channels, then those of four in conv1.
        scores = [torch.arange(float(n)) for n in tuner.graph.groups]
        scores[0] *= 1e-3 if len(seen) == 1 else 1e3
        return scores

    proposal = Scripted(scores=score)(space, task, setting())
    assert seen == [w.vector for w in proposal.trajectory]
    assert seen[:3] == [(16, 32), (14, 32), (14, 28)]
    assert torch.allclose(weights[1], weights[0][:, 2:], atol=1e-6)
    assert torch.allclose(weights[2], weights[1][4:], atol=1e-6)
    assert len(proposal.provenance["members"]) == len(proposal.trajectory)


def test_the_base_is_trained_by_the_recipe() -> None:
    """The first network that is scored is the one that the recipe trains."""
    space, task = space_of("Residual"), small_task()
    model = space.build(space.base, seed=0)
    *_, result = fit(model, task, RECIPE, seed=0)
    found = []

    def score(tuner: FineTuner) -> list[Tensor]:
        found.append((tuner.value(), [p.detach().clone() for p in tuner.model.parameters()]))
        tuner.tune()
        return [torch.ones(n) for n in tuner.graph.groups]

    Scripted(scores=score)(space, task, setting())
    assert found[0][0] == result.value
    assert all(map(torch.equal, found[0][1], model.parameters()))


@pytest.mark.parametrize("per", ["macs", "params"])
def test_the_cost_that_information_is_divided_by_changes_the_order(per: Any) -> None:
    """By hand: with equal information per channel, the costliest step is removed first."""
    space = space_of("Residual")
    removal = GreedyRemoval(space, per=per)
    whole, *narrower = space.cost_form(per)([space.base.vector, (14, 32), (16, 28)])
    per_step = np.array([2.0, 4.0])  # 1 per channel
    worth = per_step / (whole - narrower)
    assert removal.weakest(per_step) == worth.argmin()
    # An axis with slightly less information goes first, unless its step saves far less.
    cheap = int(worth.argmax())
    per_step[cheap] *= 0.95
    assert GreedyRemoval(space, per="channel").weakest(per_step) == cheap
    assert removal.weakest(per_step) != cheap

    def even(tuner: FineTuner) -> list[Tensor]:
        tuner.tune()
        slopes = [0.95 if i == cheap else 1.0 for i in range(2)]
        return [s * torch.ones(n) for s, n in zip(slopes, tuner.graph.groups, strict=True)]

    proposal = Scripted(scores=even, per=per)(space, small_task(), setting())
    assert proposal.trajectory[1].vector[cheap] == space.base.vector[cheap]


def test_the_lowest_score_per_channel_goes_first() -> None:
    """The mean over the channels of a step counts, not the sum."""
    removal = GreedyRemoval(space_of("Residual"), per="channel")
    assert removal.weakest(np.array([2 * 0.6, 4 * 0.5])) == 1
    assert removal.weakest(np.array([2 * 0.4, 4 * 0.5])) == 0
    assert removal.weakest(np.array([2 * 0.4, np.inf])) == 0
    assert removal.weakest(np.array([np.inf, np.inf])) is None


def test_a_space_without_narrower_networks_is_refused() -> None:
    """All axes have their smallest width."""
    space = space_of("Residual").constrained(min_width=1.0)
    with pytest.raises(SpaceError, match="must be above its smallest width"):
        Magnitude(every=1)(space, small_task(), setting())


def test_axes_whose_channels_cannot_be_told_apart_keep_their_width() -> None:
    """With zero-padded shortcuts the streams stay wide, and inner channels are removed."""
    space = resnet(8, projection=False)
    kept = {space.names[i] for i in graph_of(space).unknown}
    assert kept
    proposal = Magnitude(every=1)(space, small_task(), replace(setting(), lowest=0.95))
    narrowest = proposal.trajectory[-1]
    assert {n for n in space.names if narrowest[n] < space.base[n]} <= set(space.names) - kept
    assert len(proposal.trajectory) > 1


def test_progress_is_reported() -> None:
    """One line per epoch of the base, and one per network."""
    lines: list[str] = []
    space = space_of("Residual")
    reporting = Setting(recipe=RECIPE, lowest=0.5, report=lines.append)
    proposal = Fisher(every=1)(space, small_task(), reporting)
    assert lines[0].startswith("base: epoch 1 of 2")
    assert len(lines) == 2 + len(proposal.trajectory)
