"""Segmentation with your own U-Net, data and training: the mean IoU of discs, squares, background.

    widthsearch run examples/segmentation/study.yaml
    widthsearch train segmentation --pick knee

The images are drawn, so nothing is downloaded. Each has a disc and a square on a noisy background.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from widthsearch import SearchSpace, TrainingTrial

SIDE, CLASSES = 32, 3


def block(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution with batch norm."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Three resolutions; each way up concatenates the features of the way down."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = block(1, width), block(width, 2 * width)
        self.middle = block(2 * width, 4 * width)
        self.up2 = block(6 * width, 2 * width)
        self.up1 = block(3 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, H, W) to logits (N, classes, H, W)."""
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2.0), second], 1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2.0), first], 1))
        return self.head(x)


def unet() -> SearchSpace:
    """The space: the widths of the U-Net's five blocks."""
    return SearchSpace.from_model(UNet, (1, SIDE, SIDE), name="unet")


def drawn(count: int, seed: int) -> TensorDataset:
    """Images (N, 1, H, W) and the class of each pixel (N, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(6, SIDE - 6, (4, count, 1, 1), generator=generator)
    size = torch.randint(3, 7, (2, count, 1, 1), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    disc = (rows - place[0]) ** 2 + (columns - place[1]) ** 2 <= size[0] ** 2
    square = torch.maximum((rows - place[2]).abs(), (columns - place[3]).abs()) <= size[1]
    labels = torch.where(square, 2, disc.long())
    noise = 0.2 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    return TensorDataset((labels > 0)[:, None].float() + noise, labels)


def batches(split: str, seed: int) -> Iterable[list[Tensor]]:
    """Batches of 16 of 512 images in a new order, or of 128 of 256 others."""
    if split == "validation":
        return DataLoader(drawn(256, seed=1), 128)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(drawn(512, seed=0), 16, shuffle=True, drop_last=True, generator=generator)


def loss(network: nn.Module, batch: list[Tensor]) -> Tensor:
    """The mean cross-entropy of the pixels."""
    images, labels = batch
    return F.cross_entropy(network(images), labels)


@dataclass(frozen=True)
class Recipe:
    """The study's recipe: unknown keys and wrong types are refused before anything runs."""

    lr: float = 0.01


def train(network: nn.Module, trial: TrainingTrial[Recipe]) -> None:
    """Train by AdamW; each report has the mean IoU in percent."""
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
        reported = {"miou": mean_iou(network, trial.device)}
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        if not trial.report(reported, lambda state=state: state):
            return


@torch.no_grad()
def mean_iou(network: nn.Module, device: torch.device) -> float:
    """The mean over classes of intersection over union, in percent."""
    network.eval()
    counts = torch.zeros(CLASSES, CLASSES)
    for x, labels in batches("validation", 0):
        found = network(x.to(device)).argmax(1).cpu()
        counts += torch.bincount((CLASSES * labels + found).flatten(), minlength=9).view(3, 3)
    network.train()
    hits = counts.diagonal()
    return 100 * (hits / (counts.sum(0) + counts.sum(1) - hits)).mean().item()
