"""SynFlow: scores by hand, conservation and rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conformance import ProposerConformance, setting, small_task
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import graph_of, network_of, space_of
from torch import Tensor, nn

from widthsearch.errors import StudyError
from widthsearch.proposers.synflow import (
    SynFlow,
    linear_inputs,
    linearised,
    silence,
    synaptic_flow,
)
from widthsearch.space.search_space import SearchSpace


class TestSynFlow(ProposerConformance):
    """Ten rounds."""

    method = "synflow"
    proposer = SynFlow(rounds=10)


def tiny() -> nn.Module:
    """Two products: R = 1ᵀ |W2| |W1| 1; the second layer has four input channels of one pixel."""
    first, last = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), last)


def test_scores_by_hand() -> None:
    """Channel i has Σ_o |W2[o, i]| Σ_j |W1[i, j]|, independent of signs, biases and norms."""
    space = SearchSpace.from_model(tiny, (3, 1, 1))
    model = space.build(space.base, seed=0)
    with torch.no_grad():
        model[1].weight.fill_(-3.0)
        model[1].running_var.fill_(7.0)
    w1, w2 = (model[i].weight.detach().double().abs() for i in (0, 4))
    expected = w2.sum(0) * w1.sum((1, 2, 3))
    channels = graph_of(space)
    ones = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    (found,) = synaptic_flow(channels, linearised(model), ones)
    assert found == pytest.approx(expected.numpy())
    silence(channels, model, 0, np.array([1, 3]))
    (found,) = synaptic_flow(channels, model, ones)
    assert found == pytest.approx((expected * torch.tensor([1, 0, 1, 0])).numpy())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_flow_is_conserved(seed: int) -> None:
    """In a chain, the scores of each axis sum to R."""
    _, model, graph = network_of("Plain", seed)
    ones = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    sums = [s.sum() for s in synaptic_flow(graph, linearised(model), ones)]
    assert sums == pytest.approx([model(ones).sum().item()] * 2)


def test_rounds_are_not_one_shot() -> None:
    """Scores change while channels are removed."""
    space, task = space_of("Residual"), small_task()
    one, many = (
        SynFlow(rounds=n, per="channel")(space, task, setting()).trajectory for n in (1, 50)
    )
    assert one != many


def test_data_is_not_read() -> None:
    """No task gives the same proposal as a task."""
    space, task = space_of("Residual"), small_task()
    paths = [SynFlow(rounds=5)(space, t, setting()).trajectory for t in (task, None)]
    assert paths[0] == paths[1]


class Ranked(nn.Module):
    """Words and a number in, a mapping out; a word's embedding and the number are added."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 6)
        self.number = nn.Linear(2, 6)
        self.fc = nn.Linear(6, 2)

    def forward(self, *, ids: Tensor, context: dict[str, Tensor]) -> dict[str, Any]:
        """(N, 3) word numbers and (N, 2) to (N, 3, 2)."""
        x = self.words(ids) + self.number(context["number"])[:, None]
        return {"logits": self.fc(x), "ids": ids}


def test_any_inputs_flow() -> None:
    """By hand: floating-point inputs are ones, words those of the trace; outputs may be nested."""
    ids = torch.tensor([1, 1, 4])
    space = SearchSpace.from_model(Ranked, {"ids": ids, "context": {"number": (2,)}})
    model = space.build(space.base, seed=0)
    words, number = model.words.weight.detach().double(), model.number.weight.detach().double()
    stream = words.abs()[ids] + number.abs().sum(1)
    expected = model.fc.weight.detach().double().abs().sum(0) * stream.sum(0)
    (found,) = synaptic_flow(graph_of(space), linearised(model), linear_inputs(space))
    assert found == pytest.approx(expected.numpy())
    trajectory = SynFlow(rounds=5)(space, None, setting()).trajectory
    assert trajectory[0].vector == (6,)
    assert trajectory[-1].vector < (6,)


def test_an_output_that_is_no_number_is_refused() -> None:
    """With the way out; here a mask of the trace hides everything."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.last(self.first(x)).masked_fill(~mask, -torch.inf).softmax(-1)

    hidden = torch.zeros(3, dtype=torch.bool)
    space = SearchSpace.from_model(Masked, [(3,), hidden])
    with pytest.raises(StudyError, match=r"gives NaN; .* or use `sensitivity`, `uniform` or"):
        SynFlow()(space, None, setting())


def test_a_product_beyond_float64_is_refused() -> None:
    """The error has one line."""
    _, model, graph = network_of("Plain")
    for parameter in model.double().parameters():
        nn.init.constant_(parameter, 1e200)
    ones = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(StudyError, match="exceeds float64"):
        synaptic_flow(graph, linearised(model), ones)
