"""``check()`` finds networks that compute something else than they should."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from widthsearch.errors import SpaceError
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing.traced_model import TracedModel


class Scaled(nn.Module):
    """A network with widths as arguments, a number derived from one, and an idle parameter."""

    def __init__(self, width: int = 16, hidden: int = 24, literal: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, hidden)
        self.third = nn.Linear(hidden, 20 if literal else width)
        self.last = nn.Linear(20 if literal else width, 3)
        self.scale = width**-0.5
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 5) to (N, 3)."""
        hidden = torch.tanh(self.second(torch.tanh(self.first(x)) * self.scale))
        return self.last(torch.tanh(self.third(hidden)))


def space_of(make: Callable[[], nn.Module] = Scaled) -> SearchSpace:
    """Its space."""
    return SearchSpace.from_model(make, (5,), name="scaled")


def test_the_report_says_what_was_compared() -> None:
    """A class with widths as arguments, one with a literal, and a module."""
    tied = space_of(lambda: Scaled(16))
    free = space_of(lambda: Scaled(literal=True))
    assert "start and outputs equal those of the model's class at: base; masks equal" in str(
        free.check(vectors=1)
    )
    assert tied.check(vectors=0).constructed[0] == "base"
    given = SearchSpace.from_model(Scaled(), (5,)).check(vectors=0)
    assert given.constructed == () and "at: no network: its class takes no" in str(given)
    assert given.masked == 3 and given.idle == ("idle",)
    assert "two training steps move every trainable parameter but 1, as in the model (idle)" in str(
        given
    )
    assert "start and outputs" not in str(tied.check(vectors=0, device="meta"))


class Plain(nn.Module):
    """A network whose every width is an argument."""

    def __init__(self, widths: tuple[int, ...] = (16, 24)) -> None:
        super().__init__()
        a, b = widths
        self.layers = nn.Sequential(nn.Linear(5, a), nn.Tanh(), nn.Linear(a, b), nn.Linear(b, 3))
        self.scale = b**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """(N, 5) to (N, 3)."""
        return self.layers(x) * self.scale


def test_networks_are_compared_with_the_class_at_other_widths() -> None:
    """Its own arguments give these widths."""
    report = space_of(Plain).check(vectors=1)
    assert report.constructed == ("base", "narrowest", "widest", "random 1")
    reference = space_of(Plain).model.reference([4, 6], seed=0)
    assert isinstance(reference, Plain) and reference.scale == 6**-0.5


def broken(change: Callable[[nn.Module], Any]) -> Any:
    """``TracedModel.build`` with a change to each network."""
    build = TracedModel.build

    def changed(self: TracedModel, *args: Any, **kwargs: Any) -> nn.Module:
        network = build(self, *args, **kwargs)
        if kwargs.get("device", "cpu") != "meta":
            change(network)
        return network

    return changed


def perturb(network: nn.Module) -> None:
    """Other values at the start."""
    nn.init.ones_(network.layers[2].bias)


def rescale(network: nn.Module) -> None:
    """Another number."""
    network.scale = 24**-0.5 + 0.1


class Detached(nn.Linear):
    """A layer that trains other weights than its own, as a closure over a copy does."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        return nn.functional.linear(x, self.weight.detach(), self.bias.detach())


def detach(network: nn.Module) -> None:
    """A layer that training does not reach."""
    network.layers[2].__class__ = Detached


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (perturb, r"base widths \[16, 24\]: 'layers.2.bias' does not start as the model's class"),
        (rescale, r"base widths \[16, 24\]: its outputs are 0\.\d+ off those of the model's class"),
        (detach, r"base widths .* training does not reach its 'layers.2.bias', but reaches that"),
    ],
)
def test_a_network_that_is_not_the_class_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], Any], message: str
) -> None:
    """By the tensor, the difference or the parameter."""
    space = space_of(Plain)
    monkeypatch.setattr(TracedModel, "build", broken(change))
    with pytest.raises(SpaceError, match=message):
        space.check(vectors=0)


def test_masks_that_are_no_cuts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the axis."""
    space = space_of(Plain)
    monkeypatch.setattr(
        "widthsearch.channels.masking.masked", lambda model, network, keep: nullcontext(network)
    )
    with pytest.raises(SpaceError, match=r"masking channels of axis 'layers.0' is .* off cutting"):
        space.check(vectors=0)


@dataclass
class Result:
    """What a network returns."""

    scores: Tensor
    rest: dict[str, Any]


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("scores",)

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Batch(dict):  # type: ignore[type-arg]
    """A mapping that torch does not know."""


RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a dataclass": lambda a, b: Result(a, {"b": [b], "none": None}),
    "an object": lambda a, b: SimpleNamespace(a=a, inner=SimpleNamespace(b=(b, 3))),
    "slots": lambda a, b: (Slotted(a), Slotted(b)),
    "a mapping": lambda a, b: Batch(a=a, b=b),
    "a distribution": lambda a, b: torch.distributions.Normal(a, b.exp(), validate_args=False),
    "complex": lambda a, b: torch.complex(a, b),
}


class Returning(nn.Module):
    """Two heads whose outputs come back in some object, and a memory of the last features."""

    def __init__(self, result: str, width: int = 16) -> None:
        super().__init__()
        self.result, self.seen = result, dict[str, Tensor]()
        self.stem = nn.Linear(5, width)
        self.heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        """(N, 5) to two of (N, 3)."""
        self.seen["stem"] = x = torch.tanh(self.stem(x))
        return RESULTS[self.result](*(head(x) for head in self.heads))


@pytest.mark.parametrize("result", RESULTS)
def test_outputs_are_found_in_any_object(result: str) -> None:
    """Their widths are no axes, they are compared, and training reaches what makes them."""
    space = SearchSpace.from_model(partial(Returning, result), (5,))
    assert [axis.name for axis in space.axes] == ["stem"]
    report = space.check(vectors=1)
    assert report.constructed[0] == "base" and not report.idle
    network = space.build(space.base)
    network(torch.zeros(2, 5))  # now it holds a tensor with a history, which copies do not
    assert space.extract(network, {"stem": range(8)}).stem.out_features == 8  # type: ignore[union-attr]


class Tensors(nn.Module):
    """Complex weights, a complex content of a width, and an empty buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(9, width, dtype=torch.cfloat) / 3)
        self.last = nn.Linear(width, 2, dtype=torch.cfloat)
        angles = torch.arange(width) * (2 * torch.pi / width)
        self.register_buffer("phases", torch.polar(torch.ones(width), angles))
        self.register_buffer("empty", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 16) to (N, 2), complex."""
        return self.last(torch.fft.rfft(x) @ self.first * self.phases)


def test_complex_tensors_are_compared_and_trained() -> None:
    """A complex content that differs by channel follows the width, as real ones do."""
    space = SearchSpace.from_model(Tensors, (16,))
    assert [axis.base for axis in space.axes] == [8]
    report = space.check(vectors=1)
    assert set(report.constructed) == {"base", *report.networks} and not report.idle
