"""Keypoints: the centres of a drawn disc and square by heat maps, by their mean error in pixels.

    widthsearch run examples/keypoints/study.yaml
    widthsearch train keypoints --pick knee

Images are drawn, with a noisy background. A small head returns one heat map for each of the two
centres; the expected place under its softmax is the estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from widthsearch import SearchSpace, TrainingTrial

SIDE, CELLS = 32, 16  # of an image in pixels, and of a heat map in cells of 2x2 pixels


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution with batch norm."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class HeatMaps(nn.Module):
    """A backbone of two resolutions, and a head of one convolution for each map."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = block(1, width, stride=2)
        self.down = block(width, 2 * width, stride=2)
        self.middle = block(2 * width, 2 * width)
        self.up = block(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, side, side) to heat maps (N, 2, cells, cells)."""
        fine = self.stem(x)
        coarse = self.middle(self.down(fine))
        return self.head(self.up(torch.cat([F.interpolate(coarse, scale_factor=2.0), fine], 1)))


def heat_maps() -> SearchSpace:
    """The space: the widths of the four blocks."""
    return SearchSpace.from_model(HeatMaps, (1, SIDE, SIDE), name="heat_maps")


def drawn(count: int, seed: int) -> TensorDataset:
    """Images (N, 1, side, side), and the row and column of both centres (N, 2, 2) in pixels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randint(5, SIDE - 5, (count, 2, 2), generator=generator)
    at = torch.arange(SIDE)
    rows, columns = at[:, None] - centres[..., :1, None], at - centres[..., 1:, None]
    disc = rows[:, 0] ** 2 + columns[:, 0] ** 2 <= 16
    square = torch.maximum(rows[:, 1].abs(), columns[:, 1].abs()) <= 3
    noise = 0.3 * torch.randn(count, SIDE, SIDE, generator=generator)
    return TensorDataset(((disc | square) + noise)[:, None], centres.float())


def batches(split: str, seed: int) -> Iterable[list[Tensor]]:
    """Batches of 16 of 512 images in a new order, or of 128 of 256 others."""
    if split == "validation":
        return DataLoader(drawn(256, seed=1), 128)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(drawn(512, seed=0), 16, shuffle=True, drop_last=True, generator=generator)


def loss(network: nn.Module, batch: list[Tensor]) -> Tensor:
    """The mean cross-entropy of the cell that holds each centre."""
    images, centres = batch
    cell = (centres / 2).long()
    return F.cross_entropy(network(images).flatten(2).mT, cell[..., 0] * CELLS + cell[..., 1])


@dataclass(frozen=True)
class Recipe:
    """The study's recipe."""

    lr: float = 0.01


def train(network: nn.Module, trial: TrainingTrial[Recipe]) -> None:
    """Train by AdamW; each report has the mean error in pixels."""
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
        reported = {"error_px": error(network, trial.device)}
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        if not trial.report(reported, lambda state=state: state):
            return


@torch.no_grad()
def error(network: nn.Module, device: torch.device) -> float:
    """The mean distance of estimated from true centres on the validation images, in pixels."""
    network.eval()
    distances, middle = [], 2 * torch.arange(CELLS) + 0.5
    for images, centres in batches("validation", 0):
        maps = network(images.to(device)).cpu().flatten(2).softmax(2).unflatten(2, (CELLS, CELLS))
        found = torch.stack([maps.sum(3) @ middle, maps.sum(2) @ middle], 2)
        distances.append((found - centres).norm(dim=2).mean().item())
    network.train()
    return sum(distances) / len(distances)
