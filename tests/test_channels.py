"""Channels: their positions in tensors, the gradients of gates, masks and extraction."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torchvision
from gating import tokens
from strategies import MODELS, space_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.channels.extraction import Keep
from widthsearch.channels.sums import gate_gradients, group_sums
from widthsearch.errors import SpaceError, WidthsError
from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace


def test_channels_of_a_concatenation_lie_one_after_the_other() -> None:
    """The second part starts where the first ends, at any widths."""
    space = space_of("Concatenated")
    graph = build_dependency_graph(space.model, space.widths({"stem": 6, "grow": 3}))
    assert graph.groups == (6, 3, 16)
    for key, dim in (("last.weight", 1), ("bn.weight", 0), ("bn.running_var", 0)):
        assert graph.axis[key, dim].tolist() == [0] * 6 + [1] * 3
        assert graph.group[key, dim].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_channels_of_a_flatten_are_blocks() -> None:
    """(N, C, 4, 4) flattens to 16 consecutive elements a channel."""
    space = space_of("Plain")
    graph = build_dependency_graph(space.model, space.base)
    assert graph.group["fc.weight", 1].tolist() == [i // 16 for i in range(256)]


def test_a_pruning_group_of_grouped_channels_has_one_channel_of_each_group() -> None:
    """Four groups of four: channel 0 goes with 4, 8 and 12."""
    space = space_of("Grouped")
    graph = build_dependency_graph(space.model, space.base)
    assert graph.groups == (4, 6, 8)
    assert graph.group["stem.weight", 0].tolist() == [0, 1, 2, 3] * 4
    assert graph.group["grouped.weight", 0].tolist() == [0, 1, 2, 3, 4, 5] * 4
    assert graph.group["grouped.weight", 1].tolist() == [0, 1, 2, 3]
    assert graph.group["last.weight", 1].tolist() == [0, 1, 2, 3, 4, 5] * 4


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_position_has_its_owner(name: str) -> None:
    """Nothing is unknown, and every group has as many positions as the shape has."""
    space = space_of(name)
    graph = build_dependency_graph(space.model, space.base)
    assert graph.unknown == {}
    assert all((axes >= 0).all() for axes in graph.axis.values())


# Per model and consumer: per axis, its slice of the consumer's input channels.
GATES: Mapping[str, Mapping[str, Mapping[int, tuple[int, int, int]]]] = {
    "Plain": {"conv2": {0: (0, 8, 1)}, "fc": {1: (0, 256, 16)}},
    "Residual": {"conv1": {0: (0, 16, 1)}, "conv2": {1: (0, 32, 1)}, "fc": {0: (0, 16, 1)}},
    "Concatenated": {
        "grow": {0: (0, 8, 1)},
        "last": {0: (0, 8, 1), 1: (8, 12, 1)},
        "fc": {2: (0, 16, 1)},
    },
    "Depthwise": {
        "expand": {0: (0, 8, 1)},
        "depthwise": {1: (0, 32, 1)},
        "project": {1: (0, 32, 1)},
        "fc": {0: (0, 8, 1)},
    },
    "Grouped": {"grouped": {0: (0, 16, 1)}, "last": {1: (0, 24, 1)}, "fc": {2: (0, 8, 1)}},
}


@pytest.mark.parametrize("name", sorted(GATES))
def test_saliency_equals_an_explicit_gate(name: str) -> None:
    """The gate's gradient from weights alone is that of a gate multiplied into the network."""
    space = space_of(name)
    model = space.build(space.base, seed=1).double()
    gates = [torch.ones(n, dtype=torch.float64, requires_grad=True) for n in space.base.vector]
    modules = dict(model.named_modules())

    def gated(where: Mapping[int, tuple[int, int, int]]) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            factor = torch.ones(args[0].shape[1], dtype=torch.float64)
            for axis, (start, stop, repeat) in where.items():
                outside = torch.ones(len(factor) - stop, dtype=torch.float64)
                inside = gates[axis].repeat_interleave(repeat)
                factor = factor * torch.cat([torch.ones(start).double(), inside, outside])
            return (args[0] * factor.view(1, -1, *[1] * (args[0].dim() - 2)),)

        return hook

    for layer, where in GATES[name].items():
        modules[layer].register_forward_pre_hook(gated(where))
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = build_dependency_graph(space.model, space.base)
    found = gate_gradients(graph, model, lambda: F.cross_entropy(model(x), torch.arange(16) % 10))
    F.cross_entropy(model(x), torch.arange(16) % 10).backward()
    for i, (gate, gradient) in enumerate(zip(gates, found, strict=True)):
        assert gate.grad is not None
        expected = group_sums(graph, *space.trace.axes[i].maker, gate.grad)[i]
        assert torch.allclose(expected, gradient.double(), rtol=1e-5, atol=1e-8)
        assert bool(gate.grad.any())


def random_keep(space: SearchSpace, seed: int) -> dict[str, list[int]]:
    """Channels to keep: a random width on each axis's grid, of random groups."""
    rng = random.Random(seed)
    graph = build_dependency_graph(space.model, space.base)
    keep = {}
    for i, (axis, traced) in enumerate(zip(space.axes, space.trace.axes, strict=True)):
        if i in graph.unknown:
            continue
        width = rng.choice([w for w in axis.grid if w <= axis.base])
        groups = set(rng.sample(range(graph.groups[i]), width // traced.divisor))
        of_channel = graph.channels[i].tolist()
        keep[axis.name] = [c for c, group in enumerate(of_channel) if group in groups]
    return keep


def unsettle(model: nn.Module) -> None:
    """Give every norm statistics and weights of its own, and every zero weight a value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in [*model.parameters(), *model.buffers()]:
            if p.is_floating_point() and p.dim() == 1:
                p.uniform_(0.5, 1.5, generator=generator)
            elif p.is_floating_point() and not p.any():
                p.normal_(0, 0.02, generator=generator)


def check_inheritance(space: SearchSpace, keep: Keep | None = None, widths: Any = 1.0) -> None:
    """Masking channels in a network and cutting them out give the same output."""
    keep = random_keep(space, seed=0) if keep is None else keep
    assert keep
    model = space.build(widths, seed=0).eval()
    unsettle(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, *space.input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(x)
        with space.masked(model, keep):
            expected = model(x)
        narrow = space.extract(model, keep)
        found = narrow(x)
    scale = expected.abs().max()
    assert scale > 0
    assert ((found - expected).abs().max() / scale).item() <= 1e-5
    assert not torch.allclose(full, expected, rtol=1e-3)  # the channels did something
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    counts = dict(space.widths(widths)) | {name: len(list(c)) for name, c in keep.items()}
    assert sum(p.numel() for p in narrow.parameters()) == space.cost(counts).params


class Normed(nn.Module):
    """Layer norm over channels, and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.group = nn.GroupNorm(4, 16)
        self.linear = nn.Linear(16, 24)
        self.layer = nn.LayerNorm(24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = F.gelu(self.group(self.stem(x)))
        return self.fc(self.layer(self.linear(x.mean((2, 3)))))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_masking_and_cutting_agree(name: str) -> None:
    """On every kind of small network."""
    check_inheritance(space_of(name))


def test_norms_over_channels_leave_the_masked_out() -> None:
    """Layer and group norms compute their statistics over the channels that are kept."""
    check_inheritance(SearchSpace.from_model(Normed, (3, 8, 8), min_width=0.5))


def test_fixed_groups_of_one_channel_are_no_depthwise_convolution() -> None:
    """Four groups at width 4 look like one filter a channel, but 6 filters multiply each."""
    widths = {"stem": 4, "grouped": 24, "last": 8}
    keep = {"grouped": [c for c in range(24) if c % 6 in (0, 2, 5)]}
    check_inheritance(space_of("Grouped"), keep=keep, widths=widths)


class Cosine(nn.Module):
    """Attention of two heads of any width by cosine similarity (Swin V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 2, 2)
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = self.embed(x).flatten(2).transpose(1, 2)  # (N, 16, C)
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind()
        scores = 10 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)
        return self.fc((x + self.proj(out)).mean(1))


def test_queries_and_keys_are_masked_in_their_makers() -> None:
    """Queries and keys have no consumer: masked ones must be zero, or they change the cosine."""
    space = SearchSpace.from_model(Cosine, (3, 8, 8))
    assert space.trace.axes[0].divisor == 2
    check_inheritance(space)


def test_a_linear_layer_on_windows_of_tokens_is_a_reader() -> None:
    """Rows that are split into windows and back do not hide which weights multiply them."""
    space = SearchSpace.from_model(tokens, (3, 8, 8))
    consumers = build_dependency_graph(space.model, space.base).consumers
    assert consumers == {"grow.weight": 1, "fc.weight": 1}
    check_inheritance(space)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_masking_and_cutting_agree_on_torchvision_models(name: str) -> None:
    """Residual streams, squeeze-excite and depthwise, channel shuffle."""
    check_inheritance(load_space(f"torchvision:{name}", (3, 64, 64)))


GIANTS = {"regnet_y_128gf", "vit_h_14"}
"""More than 600 million parameters, twice: left out."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(set(torchvision.models.list_models(module=torchvision.models)) - GIANTS)
)
def test_masking_and_cutting_agree_on_every_model(name: str) -> None:
    """All torchvision classification models."""
    sides = {"vit": 224, "maxvit": 224, "inception_v3": 299}
    side = next((side for prefix, side in sides.items() if name.startswith(prefix)), 64)
    check_inheritance(load_space(f"torchvision:{name}", (3, side, side)))


def test_what_is_kept_must_fit() -> None:
    """Only whole groups of existing axes are kept, on the grid."""
    grouped = space_of("Grouped")
    model = grouped.build(1.0)
    for keep, message in {
        "axis": ({"nothing": [0]}, "has no axis 'nothing'"),
        "channel": ({"stem": [16]}, "has channels 0 to 15, but 16 was to be kept"),
        "group": ({"stem": [0, 1, 2, 3]}, "are kept in groups of 4, but group 0"),
    }.values():
        with pytest.raises(WidthsError, match=message):
            grouped.extract(model, keep)
    residual = space_of("Residual")
    with pytest.raises(WidthsError, match="takes multiples of 2, but was given 3"):
        residual.extract(residual.build(1.0), {"stem": [0, 1, 2]})


class Padded(nn.Module):
    """A parameter-free shortcut pads the narrower stream (He et al. 2016, option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(3, 8, 1)
        self.wide = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = self.narrow(x)
        y = self.wide(x)
        x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return self.fc((x + y).mean((2, 3)))


def test_channels_that_two_axes_share_cannot_be_cut() -> None:
    """Widths are free of each other, but channel i of one is channel i of the other."""
    space = SearchSpace.from_model(Padded, (3, 8, 8))
    assert build_dependency_graph(space.model, space.base).unknown.keys() == {0, 1}
    with pytest.raises(SpaceError, match="have channels in common by aten"):
        space.extract(space.build(1.0), {"narrow": [0, 1, 2, 3]})


def test_a_stem_of_grey_images_is_no_depthwise_convolution() -> None:
    """It multiplies the single channel of the image, and no channels of an axis."""
    grey = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    space = SearchSpace.from_model(grey, (1, 8, 8))
    graph = build_dependency_graph(space.model, space.base)
    assert set(graph.consumers) == {"2.weight", "5.weight"}
