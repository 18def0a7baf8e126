"""torchvision's models: every one is traced, and costs exactly what its space predicts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from exact_space import reasons
from strategies import random_widths
from torch import nn
from torchvision.models import segmentation
from torchvision.models.detection import backbone_utils
from torchvision.ops import FrozenBatchNorm2d

from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace
from widthsearch.space.verification import run_and_count

SOME = """
resnet18 resnet50 vgg16_bn mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_y_400mf
squeezenet1_1 mnasnet0_5 convnext_tiny shufflenet_v2_x1_0 googlenet vit_b_16
"""
FAMILIES = SOME.split()
"""One model of each family that runs in seconds; the others are among the slow tests."""
SIDES = {"vit": 224, "maxvit": 224, "inception_v3": 299}
"""The inputs of models that do not take every size."""


def every_other_model() -> list[str]:
    """The torchvision classification models that are not among the above: 80 in all."""
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 80
    return [name for name in names if name not in FAMILIES]


def check_exact(space: SearchSpace, device: str = "meta") -> None:
    """Five random networks run forward and backward and cost what the space predicts.

    On the meta device kernels only check shapes, as strictly as the real ones.
    """
    for widths in random_widths(space, seed=1):
        net = space.build(widths, device=device, seed=0)
        assert run_and_count(net, space.input_shape, device) == space.cost(widths)
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def torchvision_space(name: str, side: int) -> SearchSpace:
    """The space of a classification model, at its own size if it takes no other."""
    side = next((side for prefix, side in SIDES.items() if name.startswith(prefix)), side)
    return load_space(f"torchvision:{name}", (3, side, side))


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_models_are_exact(name: str) -> None:
    """Forward and backward, integer for integer."""
    check_exact(torchvision_space(name, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", every_other_model())
def test_every_other_torchvision_model_is_exact(name: str) -> None:
    """All 80 classification models."""
    check_exact(torchvision_space(name, 96))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_networks_run_on_real_tensors(name: str) -> None:
    """Networks that run on the meta device run on real tensors too."""
    check_exact(torchvision_space(name, 64), "cpu")


def test_attention_is_counted_in_full() -> None:
    """Neither encoder layers' fast path nor fused attention hides its products."""
    space = load_space("torchvision:vit_b_16", (3, 224, 224))
    before = torch.backends.mha.get_fastpath_enabled()
    space.check(vectors=0, device="meta")
    assert torch.backends.mha.get_fastpath_enabled() == before


def backbone(name: str) -> nn.Module:
    """A detection backbone with a feature pyramid and frozen batch norm."""
    options: dict[str, Any] = {"weights": None, "norm_layer": FrozenBatchNorm2d}
    if name == "mobilenet_v3_large":
        return backbone_utils.mobilenet_backbone(backbone_name=name, fpn=True, **options)
    return backbone_utils.resnet_fpn_backbone(backbone_name=name, trainable_layers=3, **options)


SEGMENTATION = [f"{head}_resnet{depth}" for head in ("fcn", "deeplabv3") for depth in (50, 101)]


@pytest.mark.parametrize(
    "name",
    [
        "lraspp_mobilenet_v3_large",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (*SEGMENTATION, "deeplabv3_mobilenet_v3_large")
        ),
    ],
)
def test_segmentation_models_are_exact(name: str) -> None:
    """Outputs are dictionaries, and auxiliary heads run too."""
    options = {"weights": None, "weights_backbone": None, "num_classes": 5}
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    make = partial(getattr(segmentation, name), **options, **auxiliary)
    space = SearchSpace.from_model(make, (3, 64, 64))
    check_exact(space)
    assert reasons(space) == {}


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "resnet18"])
def test_detection_backbones_are_exact(name: str) -> None:
    """A pyramid's outputs are pinned, and nothing else."""
    space = SearchSpace.from_model(lambda: backbone(name), (3, 64, 64))
    check_exact(space)
    assert reasons(space) == {}
