"""Tabular regression: the root mean square error on Friedman's function, to be minimised.

    widthsearch run examples/tabular/study.yaml
    widthsearch train tabular --pick knee

y = 10 sin(pi x0 x1) + 20 (x2 - 0.5)^2 + 10 x3 + 5 x4 + noise of deviation 1, and five more columns
that y does not depend on (Friedman 1991): no network can have an error much below 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from widthsearch import SearchSpace, TrainingTrial

COLUMNS = 10


class Perceptron(nn.Module):
    """An embedding of the columns, two residual blocks, and the estimate."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(COLUMNS, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )
            for _ in range(2)
        )
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (N, columns) to estimates (N,), in deviations from the mean of y."""
        x = self.first(2 * x - 1)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x.relu()).squeeze(1)


def perceptron() -> SearchSpace:
    """The space: the stream's width, and the hidden width of each block."""
    return SearchSpace.from_model(Perceptron, (COLUMNS,), name="perceptron")


def rows(count: int, seed: int) -> TensorDataset:
    """Rows (N, columns) and what to estimate (N,), as (y - 14.4) / 4.9: mean and deviation of y."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, COLUMNS, generator=generator)
    y = 10 * (math.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3]
    y = y + 5 * x[:, 4] + torch.randn(count, generator=generator)
    return TensorDataset(x, (y - 14.4) / 4.9)


def batches(split: str, seed: int) -> Iterable[list[Tensor]]:
    """Batches of 64 of 4,096 rows in a new order, or all of 2,048 others."""
    if split == "validation":
        return DataLoader(rows(2048, seed=1), 2048)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(rows(4096, seed=0), 64, shuffle=True, drop_last=True, generator=generator)


def loss(network: nn.Module, batch: list[Tensor]) -> Tensor:
    """The mean squared error."""
    x, y = batch
    return F.mse_loss(network(x), y)


@dataclass(frozen=True)
class Recipe:
    """The study's recipe."""

    lr: float = 0.003


def train(network: nn.Module, trial: TrainingTrial[Recipe]) -> None:
    """Train by AdamW; each report has the error in units of y."""
    optimizer = torch.optim.AdamW(network.parameters(), trial.recipe.lr)
    if (saved := trial.resume()) is not None:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
    for epoch in range(trial.epoch, trial.epochs):
        optimizer.param_groups[0]["lr"] = trial.recipe.lr * (1 - epoch / trial.epochs)
        for batch in batches("train", trial.seed + epoch):
            optimizer.zero_grad()
            loss(network, [part.to(trial.device) for part in batch]).backward()
            optimizer.step()
        reported = {"rmse": rmse(network, trial.device)}
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        if not trial.report(reported, lambda state=state: state):
            return


@torch.no_grad()
def rmse(network: nn.Module, device: torch.device) -> float:
    """The root mean square error on the validation rows, in units of y."""
    network.eval()
    (batch,) = batches("validation", 0)
    error = loss(network, [part.to(device) for part in batch]).item()
    network.train()
    return 4.9 * math.sqrt(error)
