"""Taylor importance: gate gradients of a trained network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conformance import RECIPE, ProposerConformance, setting, small_task
from gating import gated
from numpy.typing import NDArray
from strategies import MODELS, graph_of, network_of, space_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.proposers import taylor
from widthsearch.proposers.importance import GreedyRemoval, channel_scores
from widthsearch.proposers.taylor import Taylor, importance
from widthsearch.proposers.tuning import FineTuner
from widthsearch.training.trainer import fit


class TestTaylor(ProposerConformance):
    """Ranked once, over two batches."""

    method = "taylor"
    proposer = Taylor(every=2)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_importance_equals_that_of_explicit_gates(name: str) -> None:
    """The root mean square of two batches' gate gradients, by autograd of literal gates."""
    space, model, graph = network_of(name, seed=1)
    recipe = replace(RECIPE, precision="fp32")
    tuner = FineTuner(Taylor(every=2), space, model, graph, small_task(), recipe, setting())
    batches: list[tuple[Tensor, Tensor]] = []
    loader = tuner._loader
    loss = loader.loss

    def spy(network: nn.Module, batch: Any, smoothing: float) -> Tensor:
        batches.append(batch)
        return loss(network, batch, smoothing)

    loader.loss = spy  # type: ignore[method-assign]
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    found = importance(tuner, tune=False)
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
    explicit = space.build(space.base, seed=1).double()
    gates = gated(space, explicit)
    expected = [torch.zeros(gate.shape, dtype=torch.float64) for gate in gates]
    for x, y in batches:
        value = F.cross_entropy(explicit(x.double()), y)
        gradients = torch.autograd.grad(value, gates)
        expected = [e + g.square() / 2 for e, g in zip(expected, gradients, strict=True)]
    assert len(batches) == 2
    for of_axis, square in zip(found, expected, strict=True):
        wanted = square.sqrt()
        assert torch.allclose(of_axis, wanted, rtol=1e-3, atol=1e-3 * float(wanted.max()))
        assert float(wanted.max()) > 0


def test_once_ranks_the_trained_base_by_importance_per_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trajectory is the greedy removal of these scores; nothing is trained after the base."""
    space, seen = space_of("Residual"), list[Any]()

    def spy(tuner: FineTuner, *, tune: bool) -> list[Tensor]:
        scores = importance(tuner, tune=tune)
        seen.append((scores, tune, tuner.model))
        return scores

    monkeypatch.setattr(taylor, "importance", spy)
    proposal = Taylor(every=2)(space, small_task(), setting())
    ((scores, tune, model),) = seen
    assert not tune
    trained: Any = space.build(space.base, seed=0)
    fit(trained, small_task(), RECIPE, seed=0)
    assert torch.equal(model.conv1.weight, trained.conv1.weight)
    removal = GreedyRemoval(space, per="macs")
    removal.remove_lowest(channel_scores(space, graph_of(space), scores))
    assert proposal.trajectory == removal.trajectory(32)


def test_turns_fine_tune_between_removals() -> None:
    """A member for each removal of one step, with its accuracy, down to the lowest MACs."""
    space = space_of("Residual")
    proposal = Taylor(schedule="turns", every=2)(space, small_task(), setting())
    members = proposal.provenance["members"]
    assert len(members) == len(proposal.trajectory) > 3
    assert all(0 <= member["accuracy"] <= 100 for member in members)
    path = np.array([widths.vector for widths in proposal.trajectory])
    assert ((np.diff(path, axis=0) < 0).sum(1) == 1).all()
    assert space.macs(path[-1]) <= 0.3 * space.cost(1.0).macs < space.macs(path[-2])


def test_latency_is_halps_objective() -> None:
    """Importance per predicted ms: an axis that costs no latency is kept to the end."""
    space = space_of("Residual")

    def of_conv1(widths: NDArray[np.int64]) -> NDArray[np.float64]:
        return 1.0 + widths[:, 1]

    method = Taylor(every=2, per="latency")
    proposal = method(space, small_task(), replace(setting(), latency=of_conv1))
    stem = [widths["stem"] for widths in proposal.trajectory if widths["conv1"] > 4]
    assert set(stem) == {16}
