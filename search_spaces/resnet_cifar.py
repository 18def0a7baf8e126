"""ResNets for CIFAR: the thin ones of He et al. 2016, and ResNet-18 with a 3×3 stem.

"Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch import SearchSpace


def zero_padded(x: Tensor, like: Tensor) -> Tensor:
    """The shortcut without parameters (section 3.3, option A), in the shape of ``like``.

    Every second pixel of ``x``, with zeros for the missing channels. If the next stage is narrower,
    the last channels are dropped (a negative pad crops).
    """
    stride = x.shape[2] // like.shape[2]
    missing = like.shape[1] - x.shape[1]
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, missing))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (figure 2).

    Where ``stride`` or width change, the shortcut is a 1×1 convolution (option B) if
    ``projection``, else zero-padded (option A).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        changes = stride != 1 or inputs != outputs
        self.padded = changes and not projection
        if changes and projection:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (zero_padded(x, out) if self.padded else self.shortcut(x)))


class ResNet(nn.Sequential):
    """A 3×3 stem and stages ``layer1``, ``layer2``, …, each but the first halving the resolution.

    Args:
        blocks: Number of blocks of each stage.
        widths: Number of channels of each stage.
        projection: Whether shortcuts are projections where the width changes.
        classes: Number of classes.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        projection: bool = True,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        inputs = widths[0]
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(count):
                stage.append(BasicBlock(inputs, width, 2 if i and not j else 1, projection))
                inputs = width
            self.add_module(f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, equation 14
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(depth: int, projection: bool = True, classes: int = 10, side: int = 32) -> SearchSpace:
    """The space of a thin ResNet for CIFAR of depth 6n + 2 (section 4.2): 16, 32, 64 channels."""
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise ValueError(f"`depth = 6n + 2` must hold for n >= 1, but depth={depth}")
    return SearchSpace.from_model(
        lambda: ResNet((n, n, n), (16, 32, 64), projection, classes),
        (3, side, side),
        name=f"resnet{depth}" if projection else f"resnet{depth}_zero_pad",
    )


def resnet20() -> SearchSpace:
    """ResNet-20 with projection shortcuts."""
    return resnet(20)


def resnet32() -> SearchSpace:
    """ResNet-32 with projection shortcuts."""
    return resnet(32)


def resnet56() -> SearchSpace:
    """ResNet-56 with projection shortcuts."""
    return resnet(56)


def resnet110() -> SearchSpace:
    """ResNet-110 with projection shortcuts."""
    return resnet(110)


def resnet20_zero_pad() -> SearchSpace:
    """ResNet-20 with zero-padded shortcuts, as in the paper."""
    return resnet(20, projection=False)


def resnet32_zero_pad() -> SearchSpace:
    """ResNet-32 with zero-padded shortcuts, as in the paper."""
    return resnet(32, projection=False)


def resnet56_zero_pad() -> SearchSpace:
    """ResNet-56 with zero-padded shortcuts, as in the paper."""
    return resnet(56, projection=False)


def resnet110_zero_pad() -> SearchSpace:
    """ResNet-110 with zero-padded shortcuts, as in the paper."""
    return resnet(110, projection=False)


def resnet18(classes: int = 10) -> SearchSpace:
    """ResNet-18 (table 1) at 32×32: a 3×3 stem without max-pool, stages of 64 to 512 channels."""
    return SearchSpace.from_model(
        lambda: ResNet((2, 2, 2, 2), (64, 128, 256, 512), classes=classes),
        (3, 32, 32),
        name="resnet18_cifar",
    )
