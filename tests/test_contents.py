"""What constructors write into tensors: followed, kept, or the width is pinned."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from widthsearch.space.search_space import SearchSpace


class Sequence(nn.Module):
    """A stem, something in between, and a head on (T, 6)."""

    def __init__(self, d: int, middle: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(6, d), middle(d), nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 6) to (B, 5)."""
        return self.head(torch.tanh(self.middle(self.stem(x))).mean(1))


class Added(nn.Module):
    """A parameter or a buffer with a fixed content is added."""

    def __init__(self, content: Tensor, frozen: bool) -> None:
        super().__init__()
        if frozen:
            self.fixed = nn.Parameter(content, requires_grad=False)
        else:
            self.register_buffer("fixed", content)

    def forward(self, x: Tensor) -> Tensor:
        """Add it."""
        return x + self.fixed


def sinusoids(d: int) -> Tensor:
    """Positions, as in "Attention is all you need"."""
    angle = torch.arange(7).float()[:, None] * torch.exp(
        torch.arange(0, d, 2).float() * (-math.log(1e4) / d)
    )
    return torch.cat([angle.sin(), angle.cos()], 1)


def by_numpy(d: int) -> Tensor:
    """The same kind, computed outside torch."""
    return torch.from_numpy(np.sin(np.outer(np.arange(7), np.arange(d)) / d)).float()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("content", [sinusoids, by_numpy, lambda d: torch.linspace(0, 1, d)])
def test_fixed_contents_follow_the_width(content: Callable[[int], Tensor], frozen: bool) -> None:
    """Frozen parameters and buffers hold what the constructor writes at that width."""
    make = partial(Sequence, 16, lambda d: Added(content(d), frozen))
    space = SearchSpace.from_model(make, (7, 6))
    for width in (16, 4, 24):
        built = space.build({"stem": width}, seed=0)
        assert torch.equal(built.middle.fixed, content(width))
        assert built.middle.fixed.requires_grad is False
    assert space.leftovers == ()


def bilinear(c: int) -> nn.Module:
    """A frozen depthwise upsampling with the same kernel in every channel."""
    layer = nn.ConvTranspose1d(c, c, 4, 2, 1, groups=c, bias=False)
    layer.weight.data.copy_(torch.tensor([0.25, 0.75, 0.75, 0.25]).expand(c, 1, 4))
    return layer.requires_grad_(False)


def forgetful(h: int) -> nn.LSTM:
    """Biases are zero, those of the forget gates one."""
    layer = nn.LSTM(6, h, batch_first=True)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
            parameter.data[h : 2 * h].fill_(1.0)
    return layer


class Applied(nn.Module):
    """A layer between two others."""

    def __init__(
        self, c: int, layer: Callable[[int], nn.Module], inputs: int, outputs: int
    ) -> None:
        super().__init__()
        self.a, self.layer, self.o = nn.Conv1d(inputs, c, 1), layer(c), nn.Conv1d(c, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Three in a row."""
        return self.o(self.layer(torch.relu(self.a(x))))


def test_a_kernel_that_all_channels_share() -> None:
    """Bilinear upsampling stays bilinear and frozen."""
    space = SearchSpace.from_model(partial(Applied, 16, bilinear, 3, 4), (3, 8))
    layer: Any = space.build(0.5, seed=0).layer
    assert torch.equal(layer.weight, bilinear(8).weight)
    assert not layer.weight.requires_grad


class Recurrent(nn.Module):
    """A recurrent layer with biases of its own."""

    def __init__(self, layer: Callable[[], nn.LSTM]) -> None:
        super().__init__()
        self.r = layer()
        self.o = nn.Linear(self.r.hidden_size, 5)

    def forward(self, x: Tensor) -> Tensor:
        """The last position."""
        return self.o(self.r(x)[0][:, -1])


class OwnGates(Recurrent):
    """Gates are set by the number that the layer is made with."""

    def __init__(self, h: int = 16) -> None:
        super().__init__(lambda: forgetful(h))


class LiteralGates(Recurrent):
    """Gates are set by literals."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.LSTM(6, 16, batch_first=True))
        for name in ("bias_ih_l0", "bias_hh_l0"):
            getattr(self.r, name).data[16:32] = 1.0


def test_a_part_that_the_width_chooses() -> None:
    """The forget gates are those of the new width."""
    r: Any = SearchSpace.from_model(OwnGates, (7, 6)).build({"r": 4 * 8}, seed=0).r
    expected = torch.zeros(32)
    expected[8:16] = 1
    assert torch.equal(r.bias_ih_l0, expected)
    assert torch.equal(r.bias_hh_l0, expected)


def test_a_part_that_literals_choose_pins_the_width() -> None:
    """At another width, other gates would be at these places; the reason names the line."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates, self.o = LiteralGates(), nn.Linear(5, 8)
            self.p = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.p(torch.relu(self.o(self.gates(x))))

    space = SearchSpace.from_model(Net, (7, 6))
    reasons = {pin.reason for pin in space.pinned if "gates.r" in pin.layers}
    assert any("written for the base's width at" in r and "[16:32] = 1.0" in r for r in reasons)
    built, expected = space.build(space.base, seed=0).state_dict(), LiteralGates().state_dict()
    assert torch.equal(built["gates.r.bias_ih_l0"][16:32], expected["r.bias_ih_l0"][16:32])


def test_the_zeros_of_a_padding_row_pin_no_width() -> None:
    """A part that is all of a width, and a number, does not depend on the width."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
        with torch.no_grad():
            model[2].weight[1].zero_()
        return model

    space = SearchSpace.from_model(make, (6,))
    weight = space.build({"0": 8}, seed=0)[2].weight
    assert weight[1].count_nonzero() == 0
    assert weight[0].count_nonzero() == 8


def test_a_content_of_one_size_pins_it() -> None:
    """A Sobel filter has two channels, and ``eye(16)`` as many as it has."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edge, self.a = nn.Conv1d(1, 2, 3, bias=False), nn.Conv1d(2, 16, 1)
            kernel = torch.tensor([[1.0, 0, -1], [1, -2, 1]])[:, None]
            self.edge.weight = nn.Parameter(kernel, requires_grad=False)
            self.same, self.o = nn.Conv1d(16, 16, 1), nn.Conv1d(16, 5, 1)
            self.same.weight.data.copy_(torch.eye(16)[..., None])

        def forward(self, x: Tensor) -> Tensor:
            x = self.same(torch.relu(self.a(torch.relu(self.edge(x)))))
            return self.o(torch.relu(x))

    with pytest.raises(Exception, match="content that fits the base's width alone at") as error:
        SearchSpace.from_model(Net, (1, 8))
    assert "kernel" in str(error.value) or "edge" in str(error.value)


def test_a_function_that_loads_weights_makes_new_networks() -> None:
    """What is loaded for the base's widths is no start at others."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
        model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
        return model

    space = SearchSpace.from_model(make, (6,))
    assert torch.equal(space.build({"0": 16}, seed=0)[0].weight, torch.ones(16, 6))
    assert 0 < space.build({"0": 8}, seed=0)[0].weight.std().item() < 0.5
    (leftover,) = space.leftovers
    assert "model.load_state_dict(" in leftover.place
    assert "networks of other widths start anew" in str(leftover)


def test_a_module_made_before_is_not_shared() -> None:
    """A function that returns what it made once: networks have layers of their own."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    space = SearchSpace.from_model(lambda: model, (6,))
    assert space.build(space.base, seed=0)[0] is not model[0]
    (leftover,) = space.leftovers
    assert "networks are copies, since it returns modules that it did not make" in str(leftover)


def test_a_function_that_works_once_is_named_with_its_line() -> None:
    """Networks are copies then, and the space says so."""
    made: list[int] = []

    def make() -> nn.Module:
        made.append(1)
        if len(made) > 1:
            raise RuntimeError("a file that is gone")
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))

    space = SearchSpace.from_model(make, (6,))
    assert space.build([8], seed=0)[0].out_features == 8
    (leftover,) = space.leftovers
    assert "a file that is gone" in leftover.reason
    assert leftover.place.startswith("test_contents.py:")


class Cyclic(nn.Module):
    """A matrix that is written entry by entry, and a width that another layer reads."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.inputs, self.matrix = nn.Linear(6, width), nn.Linear(width, width, bias=False)
        self.outputs = nn.Linear(width, 3)
        with torch.no_grad():
            for i in range(width):
                self.matrix.weight[i, (i + 1) % width] = 2.0

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) to (N, 3)."""
        return self.outputs(self.matrix(self.inputs(x).relu()).relu())


def test_a_content_written_by_one_argument_ties_the_widths_that_it_gives() -> None:
    """Both widths of the matrix are one axis: of two numbers its class could write neither."""
    space = SearchSpace.from_model(Cyclic, (6,))
    assert [(axis.name, axis.base) for axis in space.axes] == [("inputs", 12)]
    for width in (6, 20):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            expected = Cyclic(width).state_dict()
        built = space.build([width], seed=1).state_dict()
        assert all(torch.equal(built[key], value) for key, value in expected.items())


class Shifted(nn.Module):
    """A part of the channels moves by one position; its size follows the width in the class."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.part = width // 8
        self.inputs, self.mid, self.outputs = (
            nn.Linear(6, width),
            nn.Linear(width, 10),
            nn.Linear(10, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 6) to (N, 3)."""
        x = self.inputs(x)
        y = torch.zeros_like(x)
        y[:, 1:, : self.part] = x[:, :-1, : self.part]
        y[:, :, self.part :] = x[:, :, self.part :]
        return self.outputs(self.mid(y).relu()).mean(1)


def test_an_attribute_that_its_class_computes_otherwise_frees_no_width() -> None:
    """A part that grew by 1 with a width that grows by 1 would be no part of the class's."""
    space = SearchSpace.from_model(Shifted, (7, 6))
    x = torch.randn(2, 7, 6)
    for vector in (
        [axis.min_width for axis in space.axes],
        [axis.max_width for axis in space.axes],
    ):
        built: Any = space.build(vector, seed=1).eval()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            expected = Shifted(built.inputs.out_features).eval()
        assert built.part == expected.part
        if built.mid.out_features == 10:
            assert torch.equal(built(x), expected(x))


class Square(nn.Module):
    """A matrix that starts as the identity, by a function or by what is copied into a layer."""

    def __init__(self, width: int, copied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 5)
        self.same = nn.Linear(width, width, bias=False)
        if copied:
            self.same.weight.data.copy_(torch.eye(width) / width)
        else:
            self.same.weight = nn.Parameter(torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) to (N, 5)."""
        return self.b(torch.relu(self.same(torch.relu(self.a(x)))))


class States(nn.Module):
    """Rates that differ along states and not along channels, of which there are two numbers."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        inner = 2 * width
        self.a, self.up = nn.Linear(6, width), nn.Linear(width, inner)
        self.rate = nn.Parameter(torch.log(torch.arange(1, states + 1).float().repeat(inner, 1)))
        self.mix, self.b = nn.Linear(inner, states), nn.Linear(inner, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) to (N, 5)."""
        x = self.up(self.a(x))
        return self.b((self.mix(x)[:, None] * self.rate).sum(-1) * x)


class Features(nn.Module):
    """Frozen random directions, and the sines and cosines of what they give."""

    def __init__(self, width: int, half: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(2 * half, 5)
        self.register_buffer("directions", torch.randn(width, half))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) to (N, 5)."""
        x = self.a(x) @ self.directions
        return self.b(torch.cat([x.sin(), x.cos()], -1))


@pytest.mark.parametrize(
    ("kind", "base", "other", "axes"),
    [
        (Square, (16, False), (8, False), 1),
        (Square, (16, True), (24, True), 1),
        (States, (16, 4), (8, 6), 3),
        (Features, (12, 16), (8, 20), 2),
    ],
)
def test_contents_of_whole_tensors_follow_their_widths(
    kind: Any, base: tuple, other: tuple, axes: int
) -> None:
    """Widths that one content has are tied; those along which it is the same need not be."""
    space = SearchSpace.from_model(lambda: kind(*base), (6,))
    assert len(space.axes) == axes
    torch.manual_seed(1)
    constructed = kind(*other)
    built = space.model.build(space.widths_of(constructed).vector, seed=1).state_dict()
    for key, value in constructed.state_dict().items():
        assert torch.equal(built[key], value), key
