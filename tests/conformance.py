"""The promises of every proposer on several kinds of networks; a new one subclasses this."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import ClassVar

import numpy as np
import own
import pytest
import torch
from strategies import MODELS, space_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.data.config import Augmentation
from widthsearch.data.sources import Split
from widthsearch.data.tasks import OwnTask, Task
from widthsearch.errors import WidthsearchError
from widthsearch.proposers import Proposal, Proposer, Setting
from widthsearch.proposers.families import scale_proposal
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe


@cache
def small_task() -> Task:
    """Images of 8×8 pixels in ten classes of different brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(200, dtype=np.int64) % 10
    images = rng.integers(0, 128, (200, 3, 8, 8), dtype=np.uint8)
    images += (labels * 12).astype(np.uint8)[:, None, None, None]
    halves = Split(images[:100], labels[:100]), Split(images[100:], labels[100:])
    return Task("small", *halves, None, 10, (0.5,) * 3, (0.25,) * 3, Augmentation())


def global_state() -> tuple[object, ...]:
    """The global random states, and the number of threads."""
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    threads = torch.get_num_threads()
    return random.getstate(), numpy_state, torch.get_rng_state().tolist(), threads


def pixels(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy of the pixels of a batch."""
    return F.cross_entropy(network(batch[0]), batch[1])


def pictures(split: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Noise (8, 3, 8, 8), and whether each pixel is bright (8, 8, 8); three batches, or one."""
    generator = torch.Generator().manual_seed(seed + (split == "train"))
    images = torch.randn(3 if split == "train" else 1, 8, 3, 8, 8, generator=generator)
    return [(x, (x.mean(1) > 0).long()) for x in images]


def regressor() -> nn.Module:
    """A perceptron of two widths."""
    return nn.Sequential(
        *(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()),
        nn.Linear(16, 1),
    )


def segmenter() -> nn.Module:
    """Three convolutions that keep the resolution."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1)),
    )


OWN_TASKS = {
    "regression": (regressor, (3,), OwnTask(own.loss, own.batches)),
    "segmentation": (segmenter, (3, 8, 8), OwnTask(pixels, pictures)),
}
"""Tasks with a loss and batches of their own: each with a model and the shape of its input."""

OWN = Recipe(epochs=2, lr=0.01, precision="fp32")
"""Their recipe."""

RECIPE = Recipe(epochs=2, batch_size=50, lr=0.05)


def setting(seed: int = 0, device: str = "cpu") -> Setting:
    """A setting with two short epochs."""
    return Setting(seed=seed, device=device, recipe=RECIPE, lowest=0.3)


class ProposerConformance:
    """Subclass it as ``Test<Method>`` with the two attributes.

    Attributes:
        method: The proposer's name in the mapping.
        proposer: An instance that is quick.
        cannot: The error by the kind of own task for which there can be no proposal.
    """

    method: ClassVar[str]
    proposer: ClassVar[Proposer]
    cannot: ClassVar[Mapping[str, str]] = {}

    def propose(self, space: SearchSpace, seed: int = 0, device: str = "cpu") -> Proposal:
        """The proposal of the instance."""
        return type(self).proposer(space, small_task(), setting(seed, device))

    @pytest.mark.parametrize("model", sorted(MODELS))
    def test_it_proposes_members_of_the_space(self, model: str) -> None:
        """On the grid, monotone in every axis and in MACs, from the base or below."""
        space = space_of(model)
        proposal = self.propose(space)
        assert proposal.method == self.method
        path = np.array([space.widths(w.vector).vector for w in proposal.trajectory])
        assert (np.diff(path, axis=0) <= 0).all()
        assert (np.diff(space.macs(path)) < 0).all()
        assert (path[0] <= space.base.vector).all()
        assert len(path) >= 2

    @pytest.mark.parametrize("model", sorted(MODELS))
    def test_its_family_meets_budgets_from_below(self, model: str) -> None:
        """One step of one axis more exceeds the budget."""
        space = space_of(model)
        proposal = self.propose(space)
        base = space.cost(space.base).macs
        for share in (0.35, 0.6, 1.2):
            widths = scale_proposal(space, proposal, share * base)
            assert space.cost(widths).macs <= share * base
            wider = widths.vector + np.diag([axis.step for axis in space.axes])
            possible = [
                w < axis.max_width for w, axis in zip(widths.vector, space.axes, strict=True)
            ]
            assert (space.macs(wider[possible]) > share * base).any()

    def test_it_stays_inside_constraints(self) -> None:
        """With bounds, steps, pinned and tied axes."""
        tied = space_of("Grouped").constrained(min_width=0.5, tie=[["stem", "last"]])
        pinned = space_of("Residual").constrained(pin="stem", step=8)
        for space in (tied, pinned):
            for widths in self.propose(space).trajectory:
                assert space.widths(widths.vector) == widths

    def test_it_is_deterministic_and_disturbs_nothing(self) -> None:
        """The same seed gives the same proposal, and no global random state changes."""
        space = space_of("Residual")
        before = global_state(), str(space.model.template.state_dict())
        first = self.propose(space, seed=7)
        assert first == self.propose(space, seed=7)
        assert before == (global_state(), str(space.model.template.state_dict()))

    def test_it_leaves_the_users_model_alone(self) -> None:
        """A model that is passed as an object keeps its values, gradients and mode."""
        model = MODELS["Residual"]()
        assert isinstance(model, nn.Module)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.propose(SearchSpace.from_model(model, (3, 8, 8)))
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert model.training

    def test_its_provenance_is_plain_json(self) -> None:
        """It can be stored, and has the seed."""
        proposal = self.propose(space_of("Concatenated"))
        assert Proposal.from_json(json.loads(json.dumps(proposal.to_json()))) == proposal
        assert proposal.provenance["seed"] == 0

    @pytest.mark.parametrize("kind", sorted(OWN_TASKS))
    def test_it_proposes_for_a_loss_of_the_users_own(self, kind: str) -> None:
        """Members of the space, the same ones for the same seed; or one line why it cannot."""
        make_model, shape, task = OWN_TASKS[kind]
        space, asked = SearchSpace.from_model(make_model, shape), replace(setting(), recipe=OWN)
        if kind in self.cannot:
            with pytest.raises(WidthsearchError, match=self.cannot[kind]):
                type(self).proposer(space, task, asked)
            return
        proposal = type(self).proposer(space, task, asked)
        assert len(proposal.trajectory) >= 2
        for widths in proposal.trajectory:
            assert space.widths(widths.vector) == widths
        assert type(self).proposer(space, task, asked) == proposal
        assert "accuracy" not in json.dumps(proposal.to_json())

    @pytest.mark.gpu
    @pytest.mark.parametrize("model", sorted(MODELS))
    def test_it_works_on_cuda(self, model: str) -> None:
        """Members are on the grid there, too."""
        space = space_of(model)
        for widths in self.propose(space, device="cuda").trajectory:
            assert space.widths(widths.vector) == widths
