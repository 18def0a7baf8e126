"""The networks in ``search_spaces/``, against published and hand-derived counts."""

from __future__ import annotations

import inspect
import math
import sys
from typing import NamedTuple

import pytest
import torch
from strategies import SEARCH_SPACES, counted_flops, random_widths, refused
from torch import nn

from widthsearch.errors import SpaceError
from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.references import load_function


class Counts(NamedTuple):
    """What a space must have at its base widths."""

    params: int
    macs: int
    axes: int


# MACs are sums by hand over the papers' tables, k²·inputs·outputs·pixels for each convolution.
# Sources of what is compared with them:
# [He]     He et al. 2016, table 6: parameters, in millions
# [Li]     Li et al. 2017, "Pruning Filters for Efficient ConvNets", table 1
# [osmr]   github.com/osmr/imgclsmob, exact parameters (its FLOPs/2 include BN and ReLU)
# [cyf]    github.com/chenyaofo/pytorch-cifar-models, millions of parameters and MACs
# [Crow]   Crowley et al. 2018 (BayesWatch/pytorch-prunes): see docs/methods.md
# [Huang]  Huang et al. 2017, table 2: parameters, in millions
# [kl]     github.com/kuangliu/pytorch-cifar, exact parameters
# [CBM]    github.com/xiusu/Channel-Bench-Macro, Results_*.json, exact parameters and MACs
# [tv]     torchvision's constructor with num_classes=10, exact parameters

M = 9 * 16 * 16 * 32 * 32  # a 3×3 convolution of 16 channels at 32×32, 32 at 16×16, 64 at 8×8
STEM = 9 * 3 * 16 * 32 * 32
PROJECTIONS = 16 * 32 * 16 * 16 + 32 * 64 * 8 * 8


def thin(n: int) -> int:
    """ResNet-(6n + 2): 6n convolutions, of which the two that widen cost half; no shortcuts."""
    return STEM + (6 * n - 1) * M + 640


def wide(n: int) -> int:
    """WRN-(6n + 4)-2: as above at twice the width, three that widen and three shortcuts."""
    return STEM + 3 * (2 * n - 1) * 4 * M + 3 * 2 * M + 3 * 16 * 32 * 32 * 32 + 1280


V = 9 * 64 * 64 * 32 * 32  # likewise for VGG and ResNet-18, which start with 64 channels
R18 = 4 * V + 3 * (7 * V // 2 + 64 * 128 * 16 * 16)  # the blocks: 3.5 V in stages that widen

BC_BLOCKS = (  # inputs of all 16 layers to 48 channels, and 48 to 12 by 3×3; then the transition
    (1824 * 48 + 16 * 9 * 48 * 12) * 1024 + 216 * 108 * 1024,
    (3168 * 48 + 16 * 9 * 48 * 12) * 256 + 300 * 150 * 256,
    (3840 * 48 + 16 * 9 * 48 * 12) * 64,
)
BLOCKS = (  # inputs of all 12 layers to 12 channels by 3×3; then the transition
    984 * 9 * 12 * 1024 + 160 * 160 * 1024,
    2712 * 9 * 12 * 256 + 304 * 304 * 256,
    4440 * 9 * 12 * 64,
)

B = 9 * 256 * 256  # the weights of a 3×3 convolution between 256 channels; between 512, four times

SPACES = {
    # Streams of three stages and the inner width of each block. [osmr] 272,474, [cyf] 40.81M
    "resnet_cifar.py:resnet20": Counts(272_474, thin(3) + PROJECTIONS, 3 + 9),
    # [cyf] 0.47M, 69.12M
    "resnet_cifar.py:resnet32": Counts(466_906, thin(5) + PROJECTIONS, 3 + 15),
    # [osmr] 855,770, [cyf] 125.75M
    "resnet_cifar.py:resnet56": Counts(855_770, thin(9) + PROJECTIONS, 3 + 27),
    # [osmr] 1,730,714
    "resnet_cifar.py:resnet110": Counts(1_730_714, thin(18) + PROJECTIONS, 3 + 54),
    # Without projections and their BN: 2,752 parameters less. [He] 0.27M
    "resnet_cifar.py:resnet20_zero_pad": Counts(269_722, thin(3), 3 + 9),
    # [He] 0.46M
    "resnet_cifar.py:resnet32_zero_pad": Counts(464_154, thin(5), 3 + 15),
    # [He] 0.85M, [Li] 0.85M and 1.25e8
    "resnet_cifar.py:resnet56_zero_pad": Counts(853_018, thin(9), 3 + 27),
    # [He] 1.7M, [Li] 1.72M and 2.53e8
    "resnet_cifar.py:resnet110_zero_pad": Counts(1_727_962, thin(18), 3 + 54),
    # [kl] 11,173,962. Four streams, and the inner width of each block
    "resnet_cifar.py:resnet18": Counts(11_173_962, 27 * 64 * 1024 + R18 + 5120, 4 + 8),
    # [Crow] 2,243,546 and 327.6M. The stem has a width of its own
    "wide_resnet.py:wrn_40_2": Counts(2_243_546, wide(6), 1 + 3 + 18),
    # [Crow] 0.564M, 83.3M. The first group neither widens nor projects: the stem is its stream
    "wide_resnet.py:wrn_40_1": Counts(563_930, STEM + 35 * M + PROJECTIONS + 640, 3 + 18),
    # 387,968 parameters less for each 6 layers, all 3×3 convolutions and their BN
    "wide_resnet.py:wrn_28_2": Counts(2_243_546 - 2 * 387_968, wide(4), 1 + 3 + 12),
    "wide_resnet.py:wrn_22_2": Counts(2_243_546 - 3 * 387_968, wide(3), 1 + 3 + 9),
    # [Crow] 0.692M, 101.1M
    "wide_resnet.py:wrn_16_2": Counts(2_243_546 - 4 * 387_968, wide(2), 1 + 3 + 6),
    # [osmr] 769,162, [Huang] 0.8M. Stem, 48 bottlenecks, 48 growths, two transitions
    "densenet.py:densenet_bc_100_12": Counts(
        769_162, 27 * 24 * 1024 + sum(BC_BLOCKS) + 3420, 1 + 48 + 48 + 2
    ),
    # [Huang] 1.0M; by hand 108 and 2 (BN) for each input of a layer, transitions, stem, fc
    "densenet.py:densenet_40_12": Counts(1_019_722, STEM + sum(BLOCKS) + 4480, 1 + 36 + 2),
    # [kl] 14,728,266, [Li] 3.13e8. The last three cost a quarter
    "vgg.py:vgg16_bn": Counts(14_728_266, 27 * 64 * 1024 + 33 * V // 4 + 5120, 13),
    # [kl] 20,040,522, [cyf] 398.66M with two more linear layers of 512
    "vgg.py:vgg19_bn": Counts(20_040_522, 27 * 64 * 1024 + 42 * V // 4 + 5120, 16),
    # [tv] 2,236,682, [cyf] 2.24M and 87.98M. Stem, 7 stages, 16 expansions, last convolution
    "mobilenet.py:mobilenet_v2": Counts(2_236_682, 87_976_448, 1 + 7 + 16 + 1),
    # [tv] 11,181,642. A 7×7 stem at 80×80, and blocks that start at 40×40
    "torchvision_models.py:resnet18_imagenette": Counts(
        11_181_642, 49 * 3 * 64 * 6400 + R18 * 1600 // 1024 + 5120, 4 + 8
    ),
    # [tv] 23,528,522. Stem, four streams, two inner widths of each block
    "torchvision_models.py:resnet50_imagenette": Counts(23_528_522, 2_085_294_080, 1 + 4 + 32),
    # [tv] 2,236,682
    "torchvision_models.py:mobilenet_v2_imagenette": Counts(2_236_682, 152_816_000, 25),
    # [CBM] 15,356,170 and 1,436,226,560. Two streams, the inner width of each block
    "channel_bench.py:resnet": Counts(
        15_356_170, (27 * 256 + 4 * B) * 256 + (9 * 256 * 512 + 5 * 4 * B) * 64 + 5120, 2 + 5
    ),
    # [CBM] 1,804,170 and 211,281,920. Two streams, four expansions, the head
    "channel_bench.py:mobilenet": Counts(1_804_170, 211_281_920, 2 + 4 + 1),
    # By hand from the file
    "quickstart.py:digits_resnet": Counts(77_754, 763_520, 3 + 3),
}


def space_of(reference: str) -> SearchSpace:
    """The space, traced once."""
    return load_space(f"{SEARCH_SPACES / reference}")


EACH = [pytest.param(r, marks=pytest.mark.slow) if "resnet110" in r else r for r in SPACES]
"""Of the deepest ones, with blocks that others have too, only the slow tests make networks."""


@pytest.mark.parametrize("reference", SPACES)
def test_counts_are_as_published(reference: str) -> None:
    """Parameters and MACs to the last digit; no width is pinned but the input and the logits."""
    space = space_of(reference)
    cost = space.cost(space.base)
    assert Counts(cost.params, cost.macs, len(space.axes)) == SPACES[reference]
    assert {p.reason for p in space.pinned} <= {"input of the model", "output of the model"}


@pytest.mark.parametrize(
    ("reference", "quarters", "macs", "params"),
    [
        ("channel_bench.py:resnet", "1111111", 90_096_896, 963_658),
        ("channel_bench.py:resnet", "1111112", 108_971_264, 1_258_826),
        ("channel_bench.py:resnet", "4444443", 1_360_729_088, 14_176_266),
        ("channel_bench.py:mobilenet", "4432213", 120_823_296, 680_394),
        ("channel_bench.py:mobilenet", "4432214", 122_923_008, 716_234),
    ],
)
def test_axes_are_those_of_the_public_table(
    reference: str, quarters: str, macs: int, params: int
) -> None:
    """Narrower networks of [CBM], whose names are the widths in quarters: axis by axis."""
    space = space_of(reference)
    widths = [axis.base * int(digit) // 4 for axis, digit in zip(space.axes, quarters, strict=True)]
    cost = space.cost(widths)
    assert (cost.macs, cost.params) == (macs, params)


@pytest.mark.parametrize("reference", EACH)
def test_networks_cost_what_the_space_says(reference: str) -> None:
    """Narrower, wider and mixed widths build, run, and count as predicted."""
    space = space_of(reference)
    for widths in random_widths(space, seed=len(reference), mixed=1):
        net = space.build(widths, device="meta")
        cost = space.cost(widths)
        assert sum(p.numel() for p in net.parameters()) == cost.params
        assert counted_flops(net, space.input_shape, "meta") == 2 * cost.macs


def test_every_public_space_is_counted() -> None:
    """A new function that returns a space needs its counts above; names differ."""
    found = []
    for file in sorted(SEARCH_SPACES.glob("*.py")):
        known = next(r for r in SPACES if r.startswith(file.name)).partition(":")[2]
        module = sys.modules[load_function(f"{file}:{known}").__module__]
        for name, function in inspect.getmembers(module, inspect.isfunction):
            parameters = inspect.signature(function).parameters.values()
            makes_space = function.__annotations__.get("return") == "SearchSpace"
            if makes_space and all(p.default is not p.empty for p in parameters):
                found.append(f"{file.name}:{name}")
    assert sorted(found) == sorted(SPACES)
    assert len({space_of(reference).name for reference in SPACES}) == len(SPACES)


@pytest.mark.parametrize(
    "reference",
    [
        "resnet_cifar.py:resnet20",
        "wide_resnet.py:wrn_16_2",
        "densenet.py:densenet_40_12",
        "vgg.py:vgg16_bn",
        "mobilenet.py:mobilenet_v2",
    ],
)
def test_initialisation_is_the_published_one(reference: str) -> None:
    """Every convolution at half the width has variance 2 / fan-out, its own fan-out."""
    net = space_of(reference).build(0.5, seed=0)
    scaled = [
        m.weight.flatten() * math.sqrt(m.weight.shape[0] * m.weight[0, 0].numel() / 2)
        for m in net.modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert torch.cat(scaled).std().item() == pytest.approx(1, rel=0.01)


def test_zero_padding_follows_the_widths() -> None:
    """Missing channels are zeros; where the next stage is narrower, the last are left out."""
    zero_padded = load_function(f"{SEARCH_SPACES / 'resnet_cifar.py'}:zero_padded")
    x = torch.randn(2, 4, 6, 6)
    wider = zero_padded(x, torch.empty(2, 7, 3, 3))
    assert torch.equal(wider[:, :4], x[:, :, ::2, ::2])
    assert not wider[:, 4:].any()
    assert torch.equal(zero_padded(x, torch.empty(2, 3, 3, 3)), x[:, :3, ::2, ::2])
    assert torch.equal(zero_padded(x, torch.empty(2, 4, 3, 3)), x[:, :, ::2, ::2])


@pytest.mark.parametrize("streams", [(32, 32, 32), (32, 16, 8), (8, 64, 8)])
def test_zero_padded_networks_train_where_stages_narrow(streams: tuple[int, int, int]) -> None:
    """Equal, falling and rising-then-falling streams, forward and backward on real tensors."""
    space = space_of("resnet_cifar.py:resnet20_zero_pad")
    names = ("conv1", "layer2.0.conv2", "layer3.0.conv2")
    net = space.build(dict(zip(names, streams, strict=True)), seed=0)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("reference", "wrong", "rule"),
    [
        ("resnet_cifar.py:resnet", (21,), "6n + 2"),
        ("wide_resnet.py:wrn", (41, 2), "6n + 4"),
        ("densenet.py:densenet", (101, 12, True), "6n + 4"),
        ("densenet.py:densenet", (41, 12, False), "3n + 4"),
    ],
)
def test_depths_that_do_not_exist_are_refused(
    reference: str, wrong: tuple[int, ...], rule: str
) -> None:
    """With the rule and the value."""
    with refused(ValueError, f"`depth = {rule}` must hold for n >= 1, but depth={wrong[0]}"):
        load_function(f"{SEARCH_SPACES / reference}")(*wrong)


def test_any_classifier_with_other_classes() -> None:
    """The bridge is ``torchvision:NAME`` but for the logits."""
    classifier = load_function(f"{SEARCH_SPACES / 'torchvision_models.py'}:classifier")
    assert classifier("resnet18").cost(0.5) == load_space("torchvision:resnet18").cost(0.5)
    half = classifier("mobilenet_v2", (3, 64, 64), 7, width_mult=0.5)
    assert half.build(1.0, device="meta").classifier[1].out_features == 7


def test_generic_functions_say_that_they_need_arguments() -> None:
    """Depth and width have no default: the command line takes the named ones."""
    with pytest.raises(SpaceError, match="must need no arguments, but needs depth, k"):
        load_space(f"{SEARCH_SPACES / 'wide_resnet.py'}:wrn")
