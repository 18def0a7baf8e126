"""A regression with a trainer of its own, which trains in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.api import Study
from widthsearch.proposers import Proposal, Setting
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.training.job import Job, TrainingTrial, own_job
from widthsearch.training.recipe import OwnRecipe


class Net(nn.Module):
    """A network of one width that no image ever enters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3) to (N, 1)."""
        return self.last(F.dropout(self.first(x).relu(), 0.1, self.training))


@cache
def space() -> SearchSpace:
    """Widths 1, 2, ... 16."""
    return SearchSpace.from_model(Net, (3,), name="own", max_width=2.0, step=1)


@dataclass(frozen=True)
class Steps:
    """The recipe.

    Attributes:
        lr: The learning rate.
        fault: The kind of fault that a training has after its second epoch.
    """

    lr: float = 0.05
    fault: str = ""


def data() -> tuple[Tensor, Tensor]:
    """Inputs (64, 3) and what to predict of them (64, 1)."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    return x, x.prod(1, keepdim=True)


def train(network: nn.Module, trial: TrainingTrial[Steps]) -> None:
    """Train by Adam; "accuracy" grows from 0 to 100 as the error falls."""
    x, y = trial.data
    optimizer = torch.optim.Adam(network.parameters(), trial.recipe.lr)
    if (saved := trial.resume()) is not None:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
    for _ in range(trial.epoch, trial.epochs):
        for _ in range(2):
            chosen = torch.randint(64, (32,))
            loss = F.mse_loss(network(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error = loss.item()
        reported = {"accuracy": 100 / (1 + error), "loss": error, "rmse": error**0.5}
        if not trial.report(reported, lambda: state(network, optimizer)):
            return


def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean squared error of a batch."""
    return F.mse_loss(network(batch["x"]), batch["y"])


def batches(split: str, seed: int) -> Iterator[dict[str, Tensor]]:
    """Two batches of 24 training samples in an order drawn by the seed, or one of the other 16."""
    x, y = data()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(seed)).split(24)
    for index in order if split == "train" else (torch.arange(48, 64),):
        yield {"x": x[index], "y": y[index]}


def state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that the training needs to go on."""
    return {"network": network.state_dict(), "optimizer": optimizer.state_dict()}


def job(trainer: Any = train, epochs: int = 3, **recipe: Any) -> Job:
    """The job of a trainer."""
    return own_job(trainer, "own:train", OwnRecipe(epochs=epochs, **recipe), "accuracy", {})


def trial(folder: Path, of: Job | None = None, **changes: Any) -> TrainingTrial[Any]:
    """A trial of the base's widths."""
    network = space().build(space().base, seed=0)
    values = {"seed": 0, "folder": folder, **changes}
    return TrainingTrial(of or job(), network, data(), space().base, **values)


def study(folder: Path, **changes: Any) -> Study:
    """A study with the own trainer."""
    values: dict[str, Any] = {
        "name": "own",
        "trainer": train,
        "data": data,
        "recipe": {"epochs": 4},
        "proposers": ["uniform"],
        "budgets": [0.25, 0.5],
        "families": ["linear"],
        "trials": 5,
    }
    return Study(StudyConfig(**{**values, **changes}), space(), folder=folder)


def small(space: SearchSpace, task: None, setting: Setting) -> Proposal:
    """A method that reads no data: the widths from 6 to 2."""
    return Proposal("small", tuple(space.widths([n]) for n in (6, 5, 4, 3, 2)), {})
