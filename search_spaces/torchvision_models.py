"""torchvision's classifiers with another number of classes.

With 1000 classes the reference ``torchvision:NAME`` suffices. This file is not called
``torchvision.py``: in this folder Python would import it instead of torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torchvision
from torch import nn

from widthsearch import SearchSpace


def classifier(
    name: str, input_shape: Sequence[int] = (3, 224, 224), classes: int = 1000, **options: Any
) -> SearchSpace:
    """The space of a torchvision model.

    Args:
        name: The model's name in torchvision, e.g. ``efficientnet_b0``.
        input_shape: One image's shape.
        classes: Number of classes.
        options: Further arguments of its constructor, e.g. ``width_mult=1.4``, ``dropout=0.0``.
    """

    def make_model() -> nn.Module:
        model: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=classes, **options
        )
        return model

    return SearchSpace.from_model(make_model, input_shape, name=f"{name}_{classes}")


def resnet18_imagenette() -> SearchSpace:
    """ResNet-18 for Imagenette and Imagewoof: ten classes of ImageNet, at 160×160."""
    return classifier("resnet18", (3, 160, 160), 10)


def resnet50_imagenette() -> SearchSpace:
    """ResNet-50 for Imagenette and Imagewoof."""
    return classifier("resnet50", (3, 160, 160), 10)


def mobilenet_v2_imagenette() -> SearchSpace:
    """MobileNetV2 for Imagenette and Imagewoof."""
    return classifier("mobilenet_v2", (3, 160, 160), 10)
