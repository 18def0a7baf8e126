"""torchvision's models: every one is traced, and costs exactly what its space predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from exact_space import reasons
from strategies import (
    counted_flops,
    random_widths,
)
from torch import nn
from torchvision.models import segmentation
from torchvision.models.detection import backbone_utils
from torchvision.ops import FrozenBatchNorm2d

from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace
from widthsearch.space.verification import run_and_count

TORCHVISION = {
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "vgg11": 64,
    "vgg16_bn": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "densenet121": 64,
    "squeezenet1_1": 64,
    "mnasnet0_5": 64,
    "convnext_tiny": 64,
    "shufflenet_v2_x1_0": 64,
    "googlenet": 64,
    "vit_b_16": 224,
    "swin_t": 64,
}
SIDES = {"vit": 224, "maxvit": 224, "inception_v3": 299}
"""The inputs of models that do not take every size."""


def every_other_model() -> list[str]:
    """The torchvision classification models that are not among the above: 80 in all."""
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 80
    return [name for name in names if name not in TORCHVISION]


def check_torchvision(name: str, side: int, backward_on: str) -> None:
    """Five random networks run forward and backward and cost what the space predicts."""
    space = load_space(f"torchvision:{name}", (3, side, side))
    for widths in random_widths(space, seed=len(name)):
        cost = space.cost(widths)
        net = space.build(widths, device=backward_on, seed=0)
        out = net(torch.zeros(2, *space.input_shape, device=backward_on))
        out = out if isinstance(out, torch.Tensor) else sum(o.sum() for o in out)
        out.sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        assert sum(p.numel() for p in net.parameters()) == cost.params
        assert counted_flops(net, space.input_shape, backward_on) == 2 * cost.macs


@pytest.mark.parametrize(("name", "side"), TORCHVISION.items())
def test_torchvision_models_are_exact(name: str, side: int) -> None:
    """One model of each family and variant, forward and backward, integer for integer."""
    # On the meta device kernels only check shapes, as strictly as the real ones.
    check_torchvision(name, side, "meta")


@pytest.mark.slow
@pytest.mark.parametrize("name", every_other_model())
def test_every_other_torchvision_model_is_exact(name: str) -> None:
    """All 80 classification models."""
    side = next((side for prefix, side in SIDES.items() if name.startswith(prefix)), 96)
    check_torchvision(name, side, "meta")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_networks_run_on_real_tensors(name: str) -> None:
    """Networks that run on the meta device run on real tensors too."""
    check_torchvision(name, 64, "cpu")


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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fcn_resnet50", marks=pytest.mark.slow),
        pytest.param("fcn_resnet101", marks=pytest.mark.slow),
        pytest.param("deeplabv3_resnet50", marks=pytest.mark.slow),
        pytest.param("deeplabv3_resnet101", marks=pytest.mark.slow),
        "deeplabv3_mobilenet_v3_large",
        "lraspp_mobilenet_v3_large",
    ],
)
def test_segmentation_models_are_exact(name: str) -> None:
    """Outputs are dictionaries, and auxiliary heads run too."""
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}

    def make() -> nn.Module:
        function = getattr(segmentation, name)
        model: nn.Module = function(weights=None, weights_backbone=None, num_classes=5, **auxiliary)
        return model

    space = SearchSpace.from_model(make, (3, 64, 64))
    for widths in random_widths(space, seed=1):
        net = space.build(widths, device="meta")
        assert run_and_count(net, space.input_shape, "meta") == space.cost(widths)
    assert reasons(space) == {}


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "resnet18"])
def test_detection_backbones_are_exact(name: str) -> None:
    """A pyramid's outputs are pinned, and nothing else."""
    space = SearchSpace.from_model(lambda: backbone(name), (3, 64, 64))
    for widths in random_widths(space, seed=1):
        net = space.build(widths, device="meta")
        assert run_and_count(net, space.input_shape, "meta") == space.cost(widths)
    assert reasons(space) == {}
