"""The space of the quickstart study: a small residual network for 8×8 digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch import SearchSpace


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, figure 2), if needed projected."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Three stages of one block each, at 8×8, 4×4 and 2×2 pixels."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        stem, middle, last = widths
        self.conv1 = nn.Conv2d(1, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.block1 = Block(stem, stem, stem, 1)
        self.block2 = Block(stem, middle, middle, 2)
        self.block3 = Block(middle, last, last, 2)
        self.fc = nn.Linear(last, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to logits (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def digits_resnet() -> SearchSpace:
    """Six free widths, from an eighth to one and a half times the base."""
    return SearchSpace.from_model(
        DigitsResNet, (1, 8, 8), name="digits_resnet", min_width=0.125, max_width=1.5
    )
