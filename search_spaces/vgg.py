"""VGG with batch norm for CIFAR: the convolutions of the ImageNet networks and one linear layer.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
ICLR 2015, arXiv 1409.1556. At 32×32 the five poolings leave one pixel, so a single linear
layer replaces the three (Liu et al. 2017, "Network Slimming", section 4.2).
"""

from __future__ import annotations

from torch import nn

from widthsearch import SearchSpace

CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions before each pooling, by depth (table 1, columns D and E)."""


class VGG(nn.Sequential):
    """Five stages of 3×3 convolutions with BN and ReLU, each followed by max-pooling.

    Args:
        depth: 16 or 19, counted with the three linear layers of the original.
        classes: Number of classes.
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential()
        inputs = 3
        for count, width in zip(CONVOLUTIONS[depth], (64, 128, 256, 512, 512), strict=True):
            for _ in range(count):
                self.features.append(nn.Conv2d(inputs, width, 3, padding=1))
                self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU())
                inputs = width
            self.features.append(nn.MaxPool2d(2))
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(inputs, classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):  # as in torchvision's VGG
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)


def vgg(depth: int, classes: int = 10) -> SearchSpace:
    """The space of VGG-16-BN or VGG-19-BN for CIFAR."""
    return SearchSpace.from_model(
        lambda: VGG(depth, classes), (3, 32, 32), name=f"vgg{depth}_bn_cifar"
    )


def vgg16_bn() -> SearchSpace:
    """VGG-16-BN."""
    return vgg(16)


def vgg19_bn() -> SearchSpace:
    """VGG-19-BN."""
    return vgg(19)
