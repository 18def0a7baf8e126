"""Widths that belong together are one axis, and only what code really fixes is pinned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exact_space import IMAGE, Model, bases, exact_space, reasons
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.space.search_space import SearchSpace

SEQUENCE = (7, 6)

# -- writes into a part of a tensor ------------------------------------------------------------


def _assigned(m: Any, y: Tensor, index: Any, value: Tensor) -> Tensor:
    y[index] = value
    return y


WRITES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a mask": lambda m, y, x: _assigned(m, y, x.sum(-1) > 0, m.token),
    "positions": lambda m, y, x: _assigned(m, y, (slice(None), torch.arange(2)), m.token),
    "a slice": lambda m, y, x: _assigned(m, y, (slice(None), slice(1, 3)), m.token),
    "index_put_": lambda m, y, x: y.index_put_((x.sum(-1) > 0,), m.token),
    "masked_scatter": lambda m, y, x: y.masked_scatter(x.sum(-1, keepdim=True) > 0, m.q(x)),
    "index_add": lambda m, y, x: y.index_add(1, torch.arange(2), m.q(x)[:, :2]),
    "index_copy": lambda m, y, x: y.index_copy(1, torch.arange(2), m.q(x)[:, :2]),
    "slice_scatter": lambda m, y, x: y.slice_scatter(m.q(x)[:, :2], 1, 0, 2),
    "select_scatter": lambda m, y, x: y.select_scatter(m.q(x)[:, 0], 1, 0),
    "copy_": lambda m, y, x: _copied(y, m.q(x)),
}


def _copied(y: Tensor, source: Tensor) -> Tensor:
    y[:, :2].copy_(source[:, :2])
    return y


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_has_the_width_of_where_it_is_written(name: str) -> None:
    """A token, or another layer's output, is one axis with the stream it is written into."""

    def make() -> nn.Module:
        model = Model(
            lambda m, x: m.o(WRITES[name](m, m.a(x).clone(), x)),
            a=nn.Linear(6, 16),
            q=nn.Linear(6, 16),
            o=nn.Linear(16, 5),
        )
        model.token = nn.Parameter(torch.zeros(16))
        return model

    space = exact_space(make, SEQUENCE)
    free = {key for key, shape in space.trace.shapes.items() if shape[0] == {(0,): 1}}
    written = "token" if "m.token" in _source(name) else "q.weight"
    assert bases(space) == {"a": (16, 1)}
    assert {"a.weight", written} <= free


def _source(name: str) -> str:
    return "m.token" if "token" in WRITES[name].__code__.co_names else "m.q"


# -- concatenations that are taken apart again -------------------------------------------------


class Attention(nn.Module):
    """A bias of three parts against one weight of three times the width (BEiT, EVA, Swin V2)."""

    def __init__(self, width: int, heads: int, middle: str) -> None:
        super().__init__()
        self.heads, self.middle = heads, middle
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over the tokens of ``x``."""
        b, n, c = x.shape
        middle = self.k_bias if self.middle == "buffer" else torch.zeros_like(self.v_bias)
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, middle, self.v_bias)))
        if self.middle == "chunk":
            q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
        else:
            q, k, v = qkv.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.proj(x)


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("middle", ["buffer", "zeros_like", "chunk"])
def test_parts_of_a_bias_and_the_stream_are_one_axis(middle: str, heads: int) -> None:
    """It comes in groups of one channel of each head; no part has another width."""
    width = 8 * heads

    def make() -> nn.Module:
        return Model(
            lambda m, x: m.o(m.norm(m.a(x) + m.attention(m.a(x))).mean(1)),
            a=nn.Linear(6, width),
            attention=Attention(width, heads, middle),
            norm=nn.LayerNorm(width),
            o=nn.Linear(width, 5),
        )

    space = exact_space(make, SEQUENCE)
    assert bases(space) == {"a": (width, heads)}
    shapes = space.trace.shapes
    assert shapes["attention.q_bias"] == shapes["attention.v_bias"] == shapes["norm.weight"]


def test_a_concatenation_that_no_view_takes_apart_keeps_its_axes() -> None:
    """A group norm over two branches couples neither of them to the other."""
    space = exact_space(
        lambda: Model(
            lambda m, x: m.o(F.relu(m.n(torch.cat([m.a(x), m.b(x)], 1))).mean((2, 3))),
            a=nn.Conv2d(3, 16, 1),
            b=nn.Conv2d(3, 16, 3, padding=1),
            n=nn.GroupNorm(4, 32),
            o=nn.Linear(32, 5),
        ),
        IMAGE,
    )
    assert bases(space) == {"a": (16, 4), "b": (16, 4)}


# -- numbers that repeat a width ---------------------------------------------------------------


class AtOnce(nn.Module):
    """Code after the layer that reads the input compares its width with a number it keeps."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.c, self.form = 16, form
        self.a, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.norm = nn.InstanceNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        """The comparison stands right after the first layer."""
        x = self.a(x)
        n, _, h, w = x.shape
        if self.form == "view":
            x = x.view(n, self.c, h * w).view(n, self.c, h, w)
        elif self.form == "assert":
            assert x.shape[1] == self.c
        elif self.form == "raise":
            if x.shape[1] != self.c:
                raise ValueError
        elif self.form == "split":
            x = torch.cat(x.split((self.c // 2, self.c // 2), 1), 1)
        else:
            x = self.norm(x)
        return self.o(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize("form", ["view", "assert", "raise", "split", "instance norm"])
def test_a_comparison_after_the_first_layer_is_no_input_of_the_model(form: str) -> None:
    """The number that the module keeps follows the width."""
    space = exact_space(lambda: AtOnce(form), IMAGE)
    assert [axis.base for axis in space.axes] == [16]
    assert reasons(space) == {}


@dataclass(frozen=True)
class Config:
    """Numbers that several modules share."""

    hidden: int = 16


class Child(nn.Module):
    """Reads the width from its parent's argument, or from an object that it holds."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.linear = config, nn.Linear(16, 16)

    def forward(self, x: Tensor, hidden: int | None = None) -> Tensor:
        """A view to that width."""
        if hidden is None:
            mapping = isinstance(self.config, dict)
            hidden = self.config["hidden"] if mapping else self.config.hidden
        return self.linear(x).view(x.shape[0], x.shape[1], 2, hidden // 2).flatten(2) * 2


CONFIGS = {
    "a dataclass": Config,
    "a namespace": lambda: SimpleNamespace(hidden=16),
    "a dictionary": lambda: {"hidden": 16},
    "the parent": lambda: None,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_of_parents_and_configurations_follow_widths(name: str) -> None:
    """They are set on the network that is built, not on the user's object."""
    config = CONFIGS[name]()

    def make() -> nn.Module:
        model = Model(
            lambda m, x: m.o(F.relu(m.child(m.a(x), *([] if config else [m.hidden])))),
            a=nn.Linear(6, 16),
            child=Child(config),
            o=nn.Linear(16, 5),
        )
        model.hidden = 16
        return model

    space = exact_space(make, SEQUENCE)
    assert [axis.base for axis in space.axes] == [16, 16]
    assert config == CONFIGS[name]()


# -- plain numbers that are taken from widths --------------------------------------------------

SCALES: dict[str, Callable[[Tensor], Any]] = {
    "math.sqrt": lambda x: x / math.sqrt(x.size(-1)),
    "math.pow": lambda x: x * math.pow(x.size(-1), -0.5),
    "float": lambda x: x / float(x.size(-1)),
    "int": lambda x: x / int(x.size(-1) * 0.5),
    "np.sqrt": lambda x: x * (1 / np.sqrt(x.size(-1))),
    "power": lambda x: x * x.size(-1) ** -0.5,
    "quotient": lambda x: x * (1 / x.size(-1)),
    "tensor": lambda x: x / torch.sqrt(torch.tensor(x.size(-1), dtype=torch.float32)),
}
SIZES: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda x: x * x[..., : int(x.size(-1) * 0.5)].mean(),
    "view": lambda x: x.unflatten(-1, (int(math.sqrt(x.size(-1))), -1)).flatten(-2),
    "kernel": lambda x: x * _kernel(x, int(math.log2(x.size(-1))) | 1),
}


def _kernel(x: Tensor, length: int) -> Tensor:
    return F.conv1d(x.mean(1, keepdim=True), torch.ones(1, 1, length), padding="same")


def scaled(function: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    """A model that applies the function to its hidden values."""
    return lambda: Model(
        lambda m, x: m.o(F.relu(m.f(function(m.a(x))))),
        a=nn.Linear(6, 16),
        f=nn.Linear(16, 24),
        o=nn.Linear(24, 5),
    )


@pytest.mark.parametrize("name", SCALES)
def test_a_number_that_scales_values_pins_nothing(name: str) -> None:
    """Its value is that of the base in the symbolic run, and of each network when it is built."""
    space = exact_space(scaled(SCALES[name]), SEQUENCE)
    assert bases(space) == {"a": (16, 1), "f": (24, 1)}


@pytest.mark.parametrize("name", SIZES)
def test_a_number_that_becomes_a_size_pins_its_width_at_its_line(name: str) -> None:
    """Runs at other widths find it."""
    space = exact_space(scaled(SIZES[name]), SEQUENCE)
    assert bases(space) == {"f": (24, 1)}
    assert "test_pinning.py" in reasons(space)["a", 16]


# -- buffers that repeat their content ---------------------------------------------------------


def blur(groups: Callable[[Any, Tensor], Any]) -> nn.Module:
    """A depthwise convolution with one fixed filter for every channel."""
    model = Model(
        lambda m, x: m.o(F.conv2d(m.a(x), m.filter, groups=groups(m, x)).mean((2, 3))),
        a=nn.Conv2d(3, 16, 3),
        o=nn.Linear(16, 5),
    )
    model.channels = 16
    filter_ = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    model.register_buffer("filter", filter_.repeat(16, 1, 1, 1))
    return model


@pytest.mark.parametrize("given", [True, False], ids=["given", "constructed"])
def test_a_buffer_that_is_equal_in_every_channel_is_resized(given: bool) -> None:
    """The filter stays; the width is free."""
    for groups in (lambda m, _: m.channels, lambda m, _: m.filter.shape[0]):
        model = blur(groups)
        space = exact_space(model if given else lambda: blur(groups), IMAGE)  # noqa: B023
        assert bases(space) == {"a": (16, 1)}
        narrow = space.build([4], seed=0)
        assert torch.equal(narrow.filter, model.filter[:4])


def test_a_buffer_that_differs_by_channel_keeps_its_size() -> None:
    """Its content at another width is unknown."""
    model = blur(lambda m, _: m.filter.shape[0])
    model.filter[3] *= 2
    space = exact_space(nn.Sequential(model, nn.Linear(5, 8), nn.Linear(8, 2)), IMAGE)
    assert ("0.a", 16) in reasons(space)


class Experts(nn.Module):
    """Experts whose outputs are weighted, as two products with three-dimensional weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.router, self.outputs = (
            nn.Linear(6, 16),
            nn.Linear(16, 3),
            nn.Linear(16, 4),
        )
        self.up = nn.Parameter(torch.randn(3, 24, 16) / 4)
        self.down = nn.Parameter(torch.randn(3, 16, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 6) to (N, T, 4)."""
        x = self.inputs(x)
        hidden = torch.einsum("btd,ehd->bteh", x, self.up).relu()
        y = torch.einsum("bteh,edh->bted", hidden, self.down)
        return self.outputs(x + (y * self.router(x).softmax(-1)[..., None]).sum(2))


def test_the_number_of_experts_is_pinned_before_their_widths() -> None:
    """The cost has products of all three, and experts are the smallest factor."""
    space = SearchSpace.from_model(Experts, (5, 6))
    assert sorted(axis.base for axis in space.axes) == [16, 24]
    space.check(device="meta")
    assert not build_dependency_graph(space.model, space.base).unknown


class Parts(nn.Module):
    """A product with three weights at once, and a bias of two parameters and zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.weights = nn.ParameterList(torch.randn(width, width) for _ in range(3))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 6) to (B, 5)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(self.stem(x), torch.cat([*self.weights]), bias).chunk(3, -1)
        return self.head((q * k * v).mean(1))


def test_parts_of_one_size_on_both_sides_are_one_axis() -> None:
    """Weights that are concatenated, and biases of which one counts twice."""
    space = SearchSpace.from_model(lambda: Parts(16), (7, 6))
    assert len(space.axes) == 2
    assert {pin.reason for pin in space.pinned} == {"input of the model", "output of the model"}
    space.check(vectors=1)
