"""Built networks are what the user's class gives when it is constructed at their widths."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import LENGTH, Composed, composed, streams
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from random_networks import Mixed
from torch import nn

from widthsearch.channels.extraction import widths_of
from widthsearch.errors import SpaceError
from widthsearch.space.search_space import SearchSpace


def assert_same(built: nn.Module, constructed: nn.Module, x: torch.Tensor) -> None:
    """Every tensor and the output are equal."""
    found, expected = built.state_dict(), constructed.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    built.eval(), constructed.eval()
    torch.testing.assert_close(built(x), constructed(x), rtol=1e-6, atol=1e-6)


def compare(plan: tuple[str, ...], base: tuple, other: tuple, own_init: bool) -> None:
    """A space of a composed network, built at the widths of another one."""
    space = SearchSpace.from_model(partial(Composed, plan, base, own_init), (LENGTH, 5))
    x = torch.randn(2, LENGTH, 5, generator=torch.Generator().manual_seed(0))
    for widths in (base, other):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            constructed = Composed(plan, widths, own_init)
        assert_same(
            space.model.build(widths_of(space.model, constructed).vector, seed=3), constructed, x
        )


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(composed())
def test_many_built_networks_are_constructed_ones(drawn: tuple) -> None:
    """The same, more often."""
    plan, base, other, own_init = drawn
    assume(streams(plan, base) == streams(plan, other))
    compare(plan, base, other, own_init)


@settings(max_examples=50, deadline=None)
@given(composed())
def test_built_networks_are_constructed_ones(drawn: tuple) -> None:
    """Random networks at random widths: the same start for the same seed, and the same output."""
    plan, base, other, own_init = drawn
    assume(streams(plan, base) == streams(plan, other))
    compare(plan, base, other, own_init)


class Normed(nn.Module):
    """A group norm whose number of groups is given in several ways."""

    def __init__(self, width: int, groups: str) -> None:
        super().__init__()
        number = {"a channel each": width, "a quarter": width // 4, "a literal": 16}[groups]
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, 5, 3)
        self.norm = nn.GroupNorm(number, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two layers and a mean."""
        return self.b(self.norm(self.a(x)).relu()).mean((2, 3))


@pytest.mark.parametrize(
    ("groups", "unit"), [("a channel each", 1), ("a quarter", 4), ("a literal", 16)]
)
def test_groups_of_a_norm_are_those_of_the_code(groups: str, unit: int) -> None:
    """A width with as many groups as channels is free, and its network has the code's groups."""
    space = SearchSpace.from_model(partial(Normed, 16, groups), (3, 8, 8))
    assert space.trace.axes[0].divisor == unit
    x = torch.randn(2, 3, 8, 8)
    for width in (16, 32):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            constructed = Normed(width, groups)
        assert_same(space.build([width], seed=3), constructed, x)
    space.check(device="meta")


def logged(forward: Callable) -> Callable:
    """A decorator, as libraries have them."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


class Attention(nn.Module):
    """Attention whose heads have a size that the constructor computes from the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.scale = self.size**-0.5
        self.qkv = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    @logged
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The size of a head is read; the number of heads follows."""
        q, k, v = (f(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for f in self.qkv)
        attended = (q * self.scale @ k.transpose(2, 3)).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).reshape(*x.shape[:2], -1))


def test_the_size_of_a_head_is_found_behind_a_decorator() -> None:
    """The size and the scale follow the width, as the constructor has it; the number stays."""

    def make(width: int, heads: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), Attention(width, heads), nn.Linear(width, 5))

    space = SearchSpace.from_model(partial(make, 32, 4), (7, 6))
    space.check(device="meta")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        constructed = make(64, 4)
    built = space.model.build(widths_of(space.model, constructed).vector, seed=3)
    assert_same(built, constructed, torch.randn(2, 7, 6))
    assert not space.leftovers


class Split(nn.Module):
    """Two kinds of parts of one layer, whose sizes are computed from one argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.keys, self.values = width // 4 * 4, width - width % 4
        self.scale = self.keys**-0.5
        self.qkv = nn.Linear(width, 2 * self.keys + self.values)
        self.out = nn.Linear(self.values, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of one head."""
        q, k, v = self.qkv(x).split([self.keys, self.keys, self.values], -1)
        return self.out((q * self.scale @ k.transpose(1, 2)).softmax(-1) @ v)


class Repeated(nn.Module):
    """A layer that is run as often as its width says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.times, self.layer = width // 8, nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As often."""
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return x


def within(block: Callable[[int], nn.Module], width: int) -> nn.Module:
    """A block between two layers."""
    return nn.Sequential(nn.Linear(6, width), block(width), nn.Linear(width, 5))


def test_attributes_that_one_argument_gives_are_one_axis() -> None:
    """The parts have other sizes together, so that a scale follows them."""
    space = SearchSpace.from_model(partial(within, Split, 16), (7, 6))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        constructed = within(Split, 32)
    built = space.model.build(widths_of(space.model, constructed).vector, seed=3)
    assert_same(built, constructed, torch.randn(2, 7, 6))
    assert not space.leftovers
    space.check(device="meta")


class Bottleneck(nn.Module):
    """A stem, a residual block of mixed convolutions, and a classifier."""

    def __init__(self, c: int, hidden: int, parts: tuple[int, int, int]) -> None:
        super().__init__()
        a, b, d = parts
        self.stem = nn.Conv2d(3, c, 1)
        self.expand = Mixed(c, hidden, a)
        self.depthwise = Mixed(hidden, hidden, b, depthwise=True)
        self.project = Mixed(hidden, c, d)
        self.fc = nn.Linear(c, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, 5)."""
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x).relu()).relu())
        return self.fc(x.mean((2, 3)))


few = st.integers(1, 3)


@settings(max_examples=12, deadline=None)
@given(few, st.integers(1, 5), few, st.integers(4, 8), st.integers(1, 5))
@example(2, 3, 1, 6, 1)  # the first examples of other widths show two equal halves by chance
@example(1, 4, 1, 7, 1)  # 42 channels in four parts: two are left over
def test_parts_of_a_width_at_any_seams_follow_it(a: int, b: int, d: int, n: int, more: int) -> None:
    """Concatenated parts are split again into other parts that one argument gives."""
    c, hidden = 12 + 6 * (n % 2), 6 * n
    space = SearchSpace.from_model(partial(Bottleneck, c, hidden, (a, b, d)), (3, 8, 8))
    assert {pin.reason for pin in space.trace.pinned} <= {
        "input of the model",
        "output of the model",
    }
    other = c + 36 * more, hidden + 360 * more  # whose parts leave the same rests
    with torch.random.fork_rng():
        torch.manual_seed(3)
        constructed = Bottleneck(*other, (a, b, d))
    built = space.model.build(widths_of(space.model, constructed).vector, seed=3)
    assert_same(built, constructed, torch.randn(2, 3, 8, 8))
    assert [m.splits for m in built.modules() if isinstance(m, Mixed)] == [
        m.splits for m in constructed.modules() if isinstance(m, Mixed)
    ]
    assert not space.leftovers
    space.check(device="meta")


def test_the_first_network_has_the_numbers_of_later_ones() -> None:
    """A number that stays at the base's, or costs would be others, is found before it is built."""
    space = SearchSpace.from_model(partial(within, Repeated, 16), (6,))
    assert [space.build(0.5)[1].times for _ in range(2)] == [2, 2]


class LowRank(nn.Module):
    """A square layer and an update of low rank, each with a scale of its own."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.layer, self.scale, self.root = nn.Linear(width, width), 8 / rank, width**0.5
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the update."""
        return self.layer(x) / self.root + self.up(self.down(x)) * self.scale


def test_of_a_torn_argument_only_its_own_numbers_are_listed() -> None:
    """The number of another argument follows that one."""
    space = SearchSpace.from_model(partial(within, partial(LowRank, rank=4), 16), (6,))
    assert [each.name for each in space.leftovers] == ["root"]
    built = space.build({"1.down": 2, "0": 8})
    assert built[1].scale == 4


class Expanded(nn.Module):
    """A state space block: its inner width is a multiple of the stream's, and the state's size."""

    def __init__(self, width: int = 8, states: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.inner, self.states = int(expand * width), states
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.up = nn.Linear(width, 2 * self.inner, bias=False)
        self.parts = nn.Linear(self.inner, 2 * states, bias=False)
        rates = torch.arange(1, states + 1).float()
        self.rates = nn.Parameter(rates.log().repeat(self.inner, 1))
        self.down = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, 5) to (N, 3)."""
        x = self.stem(x)
        u, gate = self.up(x).chunk(2, -1)
        b, c = torch.split(self.parts(u), [self.states, self.states], -1)
        state, outputs = torch.zeros(len(x), self.inner, self.states), []
        for t in range(x.shape[1]):
            state = state * (-self.rates.exp()).exp() + u[:, t, :, None] * b[:, t, None]
            outputs.append((state * c[:, t, None]).sum(-1))
        return self.head((x + self.down(torch.stack(outputs, 1) * gate.sigmoid())).mean(1))


def test_an_attribute_that_sizes_tensors_follows_the_width_of_its_argument() -> None:
    """In the class ``inner`` is a multiple of the stream: both are one axis, and none is fixed."""
    space = SearchSpace.from_model(Expanded, (7, 5), step=1)
    assert sorted(axis.base for axis in space.axes) == [8, 16]
    x = torch.randn(2, 7, 5)
    for width, states in ((8, 4), (5, 3), (13, 7)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            constructed = Expanded(width, states)
        assert_same(space.build(space.widths_of(constructed), seed=3), constructed, x)


class Sum(nn.Module):
    """A convolution whose kernel is the sum of a parameter and a written identity."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.stem, self.kernel = (
            nn.Conv2d(3, width, 1),
            nn.Parameter(torch.rand(width, width, 1, 1)),
        )
        identity = torch.zeros(width, width, 1, 1)
        for i in range(width):
            identity[i, i] = 1
        self.register_buffer("identity", identity)
        self.mid, self.head = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, 2, H, W)."""
        x = nn.functional.conv2d(self.stem(x), self.kernel + self.identity)
        return self.head(self.mid(x).relu())


@pytest.mark.parametrize("width", range(4, 20, 2))
def test_widths_that_are_equal_in_the_base_are_told_apart(width: int) -> None:
    """One content has two widths of 8; whatever the others are, they become one axis."""
    space = SearchSpace.from_model(partial(Sum, 8, width), (3, 4, 4), step=1)
    assert [axis.base for axis in space.axes] == [8, width]
    space.check(vectors=1)


def test_samples_of_sizes_differ_for_any_two_axes() -> None:
    """Also where there are more axes of one width than multiples to choose from."""
    layers = [nn.Linear(4, 4) for _ in range(41)]
    space = SearchSpace.from_model(lambda: nn.Sequential(*map(copy.deepcopy, layers)), (4,))
    assert space.model.constructor is not None
    _, first, second, *_ = space.model.constructor._points()
    assert len(set(zip(first, second, strict=True))) == len(space.axes) == 40


SHARED = SimpleNamespace(width=0)
TABLE = {"hidden": 0}


class ReadsGlobals(nn.Module):
    """Reads its widths from objects of its file, which another constructor sets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, SHARED.width), nn.Linear(SHARED.width, TABLE["hidden"])
        self.scale = SHARED.width**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, 5) to (N, T, hidden)."""
        return torch.tanh(self.b(self.a(x) * self.scale))


def by_globals(width: int, hidden: int) -> nn.Module:
    """Sets them."""
    SHARED.width, TABLE["hidden"] = width, hidden
    return ReadsGlobals()


def by_closure(width: int, hidden: int) -> nn.Module:
    """Defines a class whose constructor reads them from around it."""
    sizes = {"width": width}

    class Inner(ReadsGlobals):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.a, self.b = nn.Linear(5, sizes["width"]), nn.Linear(sizes["width"], hidden)
            self.scale = sizes["width"] ** -0.5

    return Inner()


def by_class(width: int, hidden: int) -> nn.Module:
    """Defines a class that has them as attributes."""

    class Inner(ReadsGlobals):
        sizes = width, hidden

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.a, self.b = nn.Linear(5, self.sizes[0]), nn.Linear(*self.sizes)
            self.scale = self.sizes[0] ** -0.5

    return Inner()


@functools.cache
def waves(width: int) -> torch.Tensor:
    """A content that is made once, perhaps before any constructor runs."""
    return torch.arange(width).float().cos()


class Around(nn.Module):
    """A block that is given no widths as arguments, and numbers beside it that follow them."""

    def __init__(self, block: Callable[[int, int], nn.Module], width: int, hidden: int) -> None:
        super().__init__()
        self.block, self.head = block(width, hidden), nn.Linear(hidden, 2)
        self.temperature = math.log(width) / hidden
        self.register_buffer("waves", waves(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, 5) to (N, 2)."""
        return self.head(self.block(x) * self.waves).mean(1) * self.temperature


@pytest.mark.parametrize("block", [by_globals, by_closure, by_class])
def test_widths_that_reach_a_constructor_without_its_arguments(block: Any) -> None:
    """Its module is made anew when the constructor around it is given other numbers."""
    waves(12)
    space = SearchSpace.from_model(partial(Around, block, 8, 12), (7, 5), step=1)
    assert not space.leftovers
    x = torch.randn(2, 7, 5)
    for widths in ((8, 12), (5, 9), (13, 17)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            constructed = Around(block, *widths)
        assert_same(space.build(widths, seed=3), constructed, x)


class Grown(nn.Module):
    """A stream to which layers add; a tensor of the whole width stands before its layers."""

    def __init__(self, width: int = 8, growth: int = 4) -> None:
        super().__init__()
        total = width + 3 * growth
        self.gain = nn.Parameter(torch.ones(total))
        self.stem = nn.Linear(5, width)
        self.layers = nn.ModuleList(nn.Linear(width + i * growth, growth) for i in range(3))
        self.head = nn.Linear(total, 2)
        nn.init.normal_(self.head.weight, std=total**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, 5) to (N, 2)."""
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], -1)
        return self.head(x * self.gain).mean(1)


@pytest.mark.parametrize("widths", [(8, 3), (9, 2), (3, 7)])
def test_a_sum_of_widths_gives_no_argument_before_a_width_does(widths: tuple[int, int]) -> None:
    """``width`` is the stem's, and not the whole width without the growth of the base."""
    space = SearchSpace.from_model(Grown, (7, 5), step=1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        constructed = Grown(*widths)
    built = space.build(space.widths_of(constructed), seed=3)
    assert_same(built, constructed, torch.randn(2, 7, 5))


class Even(nn.Module):
    """Positions whose cosines fit into even widths alone."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        table, angle = (
            torch.zeros(7, width),
            torch.arange(7.0)[:, None] / torch.arange(1, width + 1, 2),
        )
        table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
        self.register_buffer("table", table)
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, 5) to (N, 2)."""
        return self.head(self.stem(x) + self.table).mean(1)


def test_a_content_that_the_class_refuses_to_write_is_refused() -> None:
    """It is not left unwritten: no such network can be constructed."""
    space = SearchSpace.from_model(Even, (7, 5), step=1)
    space.build([6])
    with pytest.raises(SpaceError, match="they refuse these widths: The expanded size of the te"):
        space.build([7])
