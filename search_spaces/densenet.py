"""DenseNets for CIFAR, of any depth and growth rate, with and without bottlenecks.

Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, arXiv 1608.06993.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch import SearchSpace


class DenseLayer(nn.Module):
    """BN-ReLU-conv 3×3, its output concatenated to its input (section 3, equation 2)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, inputs + growth, H, W)."""
        return torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)


class Bottleneck(nn.Module):
    """BN-ReLU-conv 1×1 to 4 × growth channels, then a dense layer (section 3, "Bottleneck")."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, inputs + growth, H, W)."""
        out = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(out)))], 1)


class Transition(nn.Sequential):
    """BN-ReLU-conv 1×1 and 2×2 average pooling between two dense blocks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Sequential):
    """Three dense blocks at 32×32, 16×16 and 8×8 (section 3, "Implementation Details").

    Args:
        depth: Number of layers with weights: 3n + 4, or 6n + 4 with bottlenecks.
        growth: Channels that each dense layer adds (the paper's k).
        bottleneck: DenseNet-BC: bottlenecks, transitions that halve the channels, and a stem of
            2 × growth channels instead of 16.
        classes: Number of classes.
    """

    def __init__(self, depth: int, growth: int, bottleneck: bool, classes: int = 10) -> None:
        super().__init__()
        per_layer = 6 if bottleneck else 3
        n, rest = divmod(depth - 4, per_layer)
        if n < 1 or rest:
            raise ValueError(f"`depth = {per_layer}n + 4` must hold for n >= 1, but depth={depth}")
        layer = Bottleneck if bottleneck else DenseLayer
        channels = 2 * growth if bottleneck else 16
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for i in range(3):
            if i:
                outputs = channels // 2 if bottleneck else channels
                self.add_module(f"trans{i}", Transition(channels, outputs))
                channels = outputs
            block = nn.Sequential(*(layer(channels + j * growth, growth) for j in range(n)))
            self.add_module(f"block{i + 1}", block)
            channels += n * growth
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as in the authors' code
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)


def densenet(depth: int, growth: int, bottleneck: bool, classes: int = 10) -> SearchSpace:
    """The space of DenseNet(-BC) of a depth and growth rate."""
    return SearchSpace.from_model(
        lambda: DenseNet(depth, growth, bottleneck, classes),
        (3, 32, 32),
        name=f"densenet_{'bc_' if bottleneck else ''}{depth}_{growth}",
    )


def densenet_bc_100_12() -> SearchSpace:
    """DenseNet-BC with 100 layers and growth rate 12."""
    return densenet(100, 12, bottleneck=True)


def densenet_40_12() -> SearchSpace:
    """DenseNet with 40 layers and growth rate 12."""
    return densenet(40, 12, bottleneck=False)
