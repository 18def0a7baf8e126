"""MobileNetV2 for CIFAR: torchvision's network with stride 1 in its first layers.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
arXiv 1801.04381.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import MobileNetV2

from widthsearch import SearchSpace

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # stride 2 at 224×224
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and first stride of each stage (table 2)."""


def make_mobilenet_v2(classes: int = 10) -> nn.Module:
    """The network with a stem of stride 1: its last feature maps have 4×4 of 32×32 pixels."""
    model = MobileNetV2(classes, inverted_residual_setting=[list(stage) for stage in STAGES])
    model.features[0][0].stride = (1, 1)
    return model


def mobilenet_v2(classes: int = 10) -> SearchSpace:
    """MobileNetV2 at 32×32."""
    return SearchSpace.from_model(
        lambda: make_mobilenet_v2(classes), (3, 32, 32), name="mobilenet_v2_cifar"
    )
