"""Wide residual networks for CIFAR: WRN-d-k of any depth d and width factor k.

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch import SearchSpace


class BasicBlock(nn.Module):
    """BN-ReLU-conv twice and a shortcut (figure 1a, without dropout).

    Where the width changes, the shortcut is a 1×1 convolution of the first BN-ReLU's output.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Sequential):
    """A 3×3 stem of 16 channels and three groups of 16k, 32k and 64k (table 1).

    Args:
        depth: Number of convolutions in the longest path, 6n + 4.
        k: The width factor.
        classes: Number of classes.
    """

    def __init__(self, depth: int, k: int, classes: int = 10) -> None:
        super().__init__()
        n, rest = divmod(depth - 4, 6)
        if n < 1 or rest:
            raise ValueError(f"`depth = 6n + 4` must hold for n >= 1, but depth={depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        inputs = 16
        for i, width in enumerate((16 * k, 32 * k, 64 * k)):
            group = nn.Sequential()
            for j in range(n):
                group.append(BasicBlock(inputs, width, 2 if i and not j else 1))
                inputs = width
            self.add_module(f"block{i + 1}", group)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # "MSRinit" of the authors' code
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)


def wrn(depth: int, k: int, classes: int = 10, side: int = 32) -> SearchSpace:
    """The space of WRN-depth-k."""
    return SearchSpace.from_model(
        lambda: WideResNet(depth, k, classes), (3, side, side), name=f"wrn_{depth}_{k}"
    )


def wrn_40_2() -> SearchSpace:
    """WRN-40-2, the base of Crowley et al. 2018."""
    return wrn(40, 2)


def wrn_40_1() -> SearchSpace:
    """WRN-40-1: half the width."""
    return wrn(40, 1)


def wrn_28_2() -> SearchSpace:
    """WRN-28-2."""
    return wrn(28, 2)


def wrn_22_2() -> SearchSpace:
    """WRN-22-2."""
    return wrn(22, 2)


def wrn_16_2() -> SearchSpace:
    """WRN-16-2."""
    return wrn(16, 2)
