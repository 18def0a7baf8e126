"""Small models whose channels meet in many ways: masking equals cutting, or a line is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_networks import _half, _tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.space.computation import random_channels
from widthsearch.space.search_space import SearchSpace

Function = Callable[[Any, Tensor], Tensor]


class Mixed(nn.Module):
    """A function of the 16 channels between two convolutions and a linear layer."""

    def __init__(self, function: Function, outputs: int, layers: dict[str, Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.fc, self.function = nn.Linear(outputs, 5), function
        for name, make in layers.items():
            setattr(self, name, make())

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 6, 6) to (N, 5)."""
        y = self.function(self, self.b(F.relu(self.a(x))))
        return self.fc(y.mean((2, 3)) if y.dim() == 4 else y)


class Weighted(nn.Conv2d):
    """A convolution whose weight is a function of a parameter."""

    def __init__(self, of_weight: Callable[[Tensor], Tensor]) -> None:
        super().__init__(16, 16, 3, padding=1)
        self.of_weight = of_weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, 16, H, W) to the same."""
        return F.conv2d(x, self.of_weight(self.weight), self.bias, padding=1)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    """A function that makes a parameter."""
    return lambda: nn.Parameter(torch.randn(shape) / 3)


def written(write: Callable[[Tensor, Tensor], None]) -> Function:
    """A function that writes into a copy of its input."""

    def function(_: Any, x: Tensor) -> Tensor:
        y = x.clone()
        write(y, x)
        return y

    return function


def _indexed_constant(y: Tensor, _: Tensor) -> None:
    y[:, :, torch.tensor([0, 2])] = 1.0


def _indexed_values(y: Tensor, x: Tensor) -> None:
    y[:, :, torch.tensor([0, 2])] = x[:, :, 3:5]


def _other_half(y: Tensor, x: Tensor) -> None:
    y[:, : y.shape[1] // 2] = x[:, x.shape[1] // 2 :]


def _image(t: Tensor) -> Tensor:
    return t.transpose(1, 2).unflatten(2, (6, 6))


def _heads(m: Any, x: Tensor, how: str, kv: int = 4) -> Tensor:
    t = _tokens(x)
    q = m.q(t).unflatten(-1, (4, -1)).transpose(1, 2)
    k, v = (of(t).unflatten(-1, (kv, -1)).transpose(1, 2) for of in (m.k, m.v))
    if how == "repeated":
        k, v = (of.repeat_interleave(4 // kv, 1) for of in (k, v))
    elif how == "expanded":
        k, v = (of[:, :, None].expand(-1, -1, 4 // kv, -1, -1).flatten(1, 2) for of in (k, v))
    if how == "linear":
        y = q.softmax(-1) @ (k.softmax(-2).mT @ v)
    elif how == "across":
        y = ((F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1) @ v.mT).mT
    elif how == "grouped":
        q = q.unflatten(1, (kv, -1))
        scores = torch.einsum("nghld,ngmd->nghlm", q, k) / math.sqrt(q.shape[-1])
        y = torch.einsum("nghlm,ngmd->nghld", scores.softmax(-1), v).flatten(1, 2)
    else:
        y = F.scaled_dot_product_attention(query=q, key=k, value=v, enable_gqa=how == "gqa")
    return _image(m.out(y.transpose(1, 2).flatten(2)))


def heads(how: str, kv: int = 4) -> tuple[Function, int, dict[str, Any]]:
    """Attention of four heads and ``kv`` heads of keys and values."""
    key = lambda: nn.Linear(16, 4 * kv)  # noqa: E731
    makes = {"q": lambda: nn.Linear(16, 16), "k": key, "v": key, "out": lambda: nn.Linear(16, 16)}
    return lambda m, x: _heads(m, x, how, kv), 16, makes


def case(function: Function, outputs: int = 16, **layers: Any) -> tuple[Function, int, Any]:
    """A function, its channels, and functions that make its layers."""
    return function, outputs, layers


def plain(function: Callable[[Tensor], Tensor]) -> tuple[Function, int, Any]:
    """A function without layers."""
    return case(lambda _, x: function(x))


def weighted(of_weight: Callable[[Tensor], Tensor]) -> tuple[Function, int, Any]:
    """A convolution with a computed weight."""
    return case(lambda m, x: m.c(x), c=lambda: Weighted(of_weight))


def _standardised(w: Tensor) -> Tensor:
    rows = w.reshape(1, len(w), -1)
    return F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(w)


CASES: dict[str, tuple[Function, int, Any]] = {
    # parts
    "halves swap": plain(lambda x: torch.cat(_half(x)[::-1], 1)),
    "uneven parts": plain(lambda x: torch.cat(x.chunk(4, 1)[1:] + x.chunk(4, 1)[:1], 1)),
    "parts overlap": case(
        lambda _, x: x[:, : 3 * x.shape[1] // 4] + x[:, x.shape[1] // 4 :], outputs=12
    ),
    "rolled half": plain(lambda x: x.roll(x.shape[1] // 2, 1)),
    "flipped": plain(lambda x: x.flip(1)),
    "shuffled": plain(lambda x: x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)),
    "pixel shuffle": case(lambda _, x: F.pixel_shuffle(x, 2), outputs=4),
    "pixel unshuffle": case(lambda _, x: F.pixel_unshuffle(x, 2), outputs=64),
    "cat twice": case(
        lambda m, x: m.c(torch.cat([x, x], 1)), c=lambda: nn.Conv2d(32, 16, 3, padding=1)
    ),
    "cat and norm": case(
        lambda m, x: m.c(m.n(torch.cat([x, -x, x * x], 1))),
        c=lambda: nn.Conv2d(48, 16, 1),
        n=lambda: nn.GroupNorm(3, 48),
    ),
    "ratio": case(lambda m, x: F.glu(x, 1), outputs=8),
    "maxout": case(lambda _, x: x.unflatten(1, (2, -1)).max(1)[0], outputs=8),
    "repeated": case(lambda _, x: x.repeat_interleave(2, 1), outputs=32),
    "only its size": weighted(lambda w: w * (2 / w[0].numel()) ** 0.5),
    # functions of several channels
    "log softmax": plain(lambda x: F.log_softmax(x, 1)),
    "running product": plain(lambda x: (x * 0.1 + 1).cumprod(1)),
    "running maximum": plain(lambda x: x.cummax(1)[0]),
    "running log of sums": plain(lambda x: x.logcumsumexp(1)),
    "largest": plain(lambda x: x - x.max(1, keepdim=True)[0]),
    "smallest": plain(lambda x: x - x.min(1, keepdim=True)[0]),
    "largest of all": plain(lambda x: x / x.abs().max()),
    "any": plain(lambda x: x * (x > 0.5).any(1, keepdim=True)),
    "all": plain(lambda x: x * (x > -0.5).all(1, keepdim=True)),
    "running product of rows": plain(lambda x: x.cumprod(2)),
    "norm of all": plain(lambda x: x / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)),
    "scaled norm": plain(lambda x: F.normalize(x, dim=1) * math.sqrt(x.shape[1])),
    "response norm": case(
        lambda _, x: x / x.norm(dim=(2, 3), keepdim=True).mean(1, keepdim=True)
    ),
    "numpy's names": plain(
        lambda x: (x - x.mean(axis=1, keepdims=True)) / x.var(axis=(1, 2), keepdims=True)
    ),
    "named arguments": plain(lambda x: x - torch.mean(input=x, dim=1, keepdim=True)),
    "spectrum of rows": plain(lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=(6, 6))),
    "spectral layer": case(
        lambda m, x: torch.fft.irfft2(
            torch.einsum("nchw,cdhw->ndhw", torch.fft.rfft2(x), torch.view_as_complex(m.w)),
            s=(6, 6),
        ),
        w=parameter(16, 16, 6, 4, 2),
    ),
    "windows": case(
        lambda m, x: m.c(F.unfold(x, 3, padding=1)).mean(2), c=lambda: nn.Conv1d(144, 16, 1)
    ),
    "windows and back": plain(lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2)),
    "sampled": case(
        lambda m, x: F.grid_sample(x, m.g(x).permute(0, 2, 3, 1).tanh(), align_corners=False),
        g=lambda: nn.Conv2d(16, 2, 1),
    ),
    "maps of one channel": case(
        lambda m, x: x * m.c(torch.cat([x.mean(1, True), x.max(1, True)[0]], 1)).sigmoid(),
        c=lambda: nn.Conv2d(2, 1, 3, padding=1),
    ),
    "merged with the batch": case(
        lambda m, x: F.conv2d(x.reshape(-1, 1, 6, 6), m.k, padding=1).view_as(x),
        k=parameter(1, 1, 3, 3),
    ),
    # writes
    "constant by index": case(written(_indexed_constant)),
    "values by index": case(written(_indexed_values)),
    "the other half": case(written(_other_half)),
    "chosen by a scalar": plain(lambda x: torch.where(x.mean(1, keepdim=True) > 0, x, 0.0)),
    # weights
    "distances": case(
        lambda m, x: torch.cdist(_tokens(x), m.w).mean(1), outputs=7, w=parameter(7, 16)
    ),
    "bilinear": case(
        lambda m, x: m.p(x.mean((2, 3)), m.c(x).mean((2, 3))),
        p=lambda: nn.Bilinear(16, 8, 16),
        c=lambda: nn.Conv2d(16, 8, 1),
    ),
    "outer product": case(
        lambda m, x: m.p((x.mean((2, 3))[:, :, None] * m.c(x).mean((2, 3))[:, None]).flatten(1)),
        p=lambda: nn.Linear(128, 16),
        c=lambda: nn.Conv2d(16, 8, 1),
    ),
    "transposed, grouped": case(
        lambda m, x: m.c(x), outputs=24, c=lambda: nn.ConvTranspose2d(16, 24, 2, 2, groups=4)
    ),
    "transposed, depthwise": case(
        lambda m, x: m.c(x), c=lambda: nn.ConvTranspose2d(16, 16, 2, 2, groups=16)
    ),
    "two filters a channel": case(
        lambda m, x: m.c(x), outputs=32, c=lambda: nn.Conv2d(16, 32, 3, padding=1, groups=16)
    ),
    "volumes": case(
        lambda m, x: m.p(m.c(x.unsqueeze(2))).mean(2),
        c=lambda: nn.Conv3d(16, 24, (1, 3, 3)),
        p=lambda: nn.Conv3d(24, 16, 1, groups=2),
    ),
    "tied": case(
        lambda m, x: _image(F.linear(F.relu(m.p(_tokens(x))), m.p.weight.t())),
        p=lambda: nn.Linear(16, 24),
    ),
    "weight norm": case(
        lambda m, x: m.c(x), c=lambda: parametrizations.weight_norm(nn.Conv2d(16, 16, 1))
    ),
    "standardised by batch norm": weighted(_standardised),
    "quantised": weighted(lambda w: (w / w.abs().max() * 7).round() / 7),
    "normalised rows": weighted(lambda w: F.normalize(w.flatten(1), dim=1).view_as(w)),
    # numbers that are sizes
    "tensor of a size": plain(lambda x: x / torch.sqrt(torch.tensor(x.shape[1], dtype=x.dtype))),
    "full of a size": plain(lambda x: x * torch.full((1,), x.shape[1])),
    "clamped by a size": plain(lambda x: (x * 9).clamp(max=x.shape[1])),
    "compared with a size": plain(lambda x: x * (x * 9 > x.shape[1])),
    "filled by a size": plain(lambda x: x.masked_fill(x > 0, x.shape[1])),
    # heads
    "linear attention": heads("linear"),
    "attention across channels": heads("across"),
    "named operands": heads(""),
    "grouped queries": heads("gqa", kv=2),
    "repeated keys": heads("repeated", kv=2),
    "expanded keys": heads("expanded", kv=2),
    "products of grouped heads": heads("grouped", kv=2),
}  # fmt: skip
UNKNOWN: dict[str, tuple[tuple[Function, int, Any], str]] = {
    "sorted": (plain(lambda x: x.sort(1)[0]), "aten.sort"),
    "position of the largest": (plain(lambda x: x * x.max(1, keepdim=True)[1]), "aten."),
    "spectrum": (plain(lambda x: torch.fft.fft(x, dim=1).real), "aten.fft_fft"),
    "mirrored sum": (plain(lambda x: x.flip(1) + x), "tied to each other by aten.add"),
    "differences": (
        case(lambda _, x: x[:, 1:] - x[:, :-1], outputs=15), "tied to each other by aten.sub"
    ),
    "groups across parts": (
        case(
            lambda m, x: m.c(m.n(torch.cat([x, m.d(x)], 1))),
            c=lambda: nn.Conv2d(24, 16, 1),
            d=lambda: nn.Conv2d(16, 8, 1),
            n=lambda: nn.GroupNorm(4, 24),
        ),
        "tied to each other by aten.native_group_norm",
    ),
    "pooled over channels": (
        case(lambda _, x: F.avg_pool1d(_tokens(x), 2).mean(1), outputs=8), "aten.avg_pool2d"
    ),
    "median": (plain(lambda x: x - x.median(1, keepdim=True)[0]), "aten.median"),
}  # fmt: skip


APART = (
    *("halves swap", "uneven parts", "rolled half", "flipped", "shuffled", "cat twice", "repeated"),
    *("pixel shuffle", "pixel unshuffle", "windows", "spectrum of rows", "values by index"),
    *("transposed, grouped", "transposed, depthwise", "two filters a channel", "volumes"),
    "outer product",
)
"""Cases in which channels only meet in the products of consumers."""


@torch.no_grad()
def check_masks(space: SearchSpace, seed: int) -> None:
    """Masking equals cutting to 1e-5 of the largest output, at random channels."""
    keep = random_channels(space, seed)[0]
    network = space.build(space.base, seed=seed).eval()
    for p in network.parameters():
        if p.dim() == 1:
            p.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, 6, 6)
    with space.masked(network, keep):
        masked = network(x)
    cut = space.extract(network, keep)(x)
    assert masked.isfinite().all()
    assert (masked - cut).abs().max() <= 1e-5 * cut.abs().max()


def space_of(of_case: tuple[Function, int, Any]) -> SearchSpace:
    """The space of the model around a function."""
    torch.manual_seed(0)
    return SearchSpace.from_model(lambda: Mixed(*of_case), (3, 6, 6))


@pytest.mark.parametrize("name", sorted(CASES))
def test_masking_equals_cutting(name: str) -> None:
    """At random channels of all axes, each of which is known."""
    space = space_of(CASES[name])
    graph = build_dependency_graph(space.model, space.base)
    assert not graph.unknown
    assert {"a", "b"} & set(space.names)
    check_masks(space, seed=0)
    check_masks(space, seed=1)


@pytest.mark.parametrize("name", APART)
@torch.no_grad()
def test_cutting_channels_without_effect_keeps_the_output(name: str) -> None:
    """Channels that all consumers multiply by zero."""
    space = space_of(CASES[name])
    graph = build_dependency_graph(space.model, space.base)
    keep = random_channels(space, 2)[0]
    network = space.build(space.base, seed=0).eval()
    kept = {
        (i, group)
        for i, axis in enumerate(space.axes)
        for group in graph.channels[i][keep.get(axis.name, range(axis.base))].tolist()
    }
    for key, dim in graph.consumers.items():
        of_position = zip(
            graph.axis[key, dim].tolist(), graph.group[key, dim].tolist(), strict=True
        )
        gone = torch.tensor([p for p, at in enumerate(of_position) if at not in kept])
        network.get_parameter(key).index_fill_(dim, gone.long(), 0.0)
    x = torch.randn(1, 3, 6, 6)
    assert torch.allclose(network(x), space.extract(network, keep)(x), atol=1e-5)


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_what_cannot_be_cut_is_unknown(name: str) -> None:
    """The reason names the operator and its line; the other axes are cut as they are masked."""
    of_case, reason = UNKNOWN[name]
    space = space_of(of_case)
    graph = build_dependency_graph(space.model, space.base)
    unknown = graph.unknown
    assert unknown and space.names.index("a") not in unknown
    assert all("test_channel_rules.py:" in why for why in unknown.values())
    assert any(reason in why for why in unknown.values())
    check_masks(space, seed=0)
