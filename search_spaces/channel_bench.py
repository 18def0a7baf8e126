"""The two networks of Channel-Bench-Macro, of which all 16,384 width vectors were trained.

Su et al., "Searching for Network Width with Bilaterally Coupled Network", TPAMI 2022,
arXiv 2203.13714. The layers are those of the two tables in github.com/xiusu/Channel-Bench-Macro:
seven widths are free, and each was trained at a quarter, half, three quarters and all of its base.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch import SearchSpace


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, and batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class ResBlock(nn.Module):
    """Two 3×3 convolutions ("RS block"); where the stream changes there is no shortcut at all."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, inner, 3, stride)
        self.conv2 = conv_norm(inner, outputs, 3)
        self.shortcut = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        out = self.conv2(F.relu(self.conv1(x)))
        return F.relu(out + x if self.shortcut else out)


class ChannelBenchResNet(nn.Module):
    """A stem of stride 2 and five blocks, at 16×16 and from the third on at 8×8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 256, 3, stride=2)
        self.block1 = ResBlock(256, 256, 256)
        self.block2 = ResBlock(256, 256, 256)
        self.block3 = ResBlock(256, 512, 512, stride=2)
        self.block4 = ResBlock(512, 512, 512)
        self.block5 = ResBlock(512, 512, 512)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, 10)."""
        x = self.block2(self.block1(F.relu(self.stem(x))))
        x = self.block5(self.block4(self.block3(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2 ("MB block") with ReLU; one that changes the stream has no shortcut.

    Sandler et al. 2018, arXiv 1801.04381, table 1.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.expand = conv_norm(inputs, inner, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.project = conv_norm(inner, outputs, 1)
        self.shortcut = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        out = F.relu(self.norm(self.depthwise(F.relu(self.expand(x)))))
        out = self.project(out)
        return out + x if self.shortcut else out


class ChannelBenchMobileNet(nn.Module):
    """A stem of stride 2 and four blocks that expand sixfold, at 16×16 and in the end at 8×8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 128, 3, stride=2)
        self.block1 = InvertedResidual(128, 768, 128)
        self.block2 = InvertedResidual(128, 768, 128)
        self.block3 = InvertedResidual(128, 768, 256, stride=2)
        self.block4 = InvertedResidual(256, 1536, 256)
        self.head = conv_norm(256, 1024, 1)
        self.fc = nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, 10)."""
        x = self.block2(self.block1(F.relu(self.stem(x))))
        x = F.relu(self.head(self.block4(self.block3(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet() -> SearchSpace:
    """Two streams, and the inner width of each of the five blocks."""
    return SearchSpace.from_model(ChannelBenchResNet, (3, 32, 32), name="channel_bench_resnet")


def mobilenet() -> SearchSpace:
    """Two streams, the inner width of each of the four blocks, and that of the head."""
    return SearchSpace.from_model(
        ChannelBenchMobileNet, (3, 32, 32), name="channel_bench_mobilenet"
    )
