"""Functions that hold modules: each network runs its own."""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.errors import TraceError
from widthsearch.modules.tree import clone, tensors_of
from widthsearch.space.search_space import SearchSpace


class Net(nn.Module):
    """A convolution block that only a function runs."""

    def __init__(self, keep: Callable[[Net], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 24, 3)
        self.o = nn.Linear(24, 5)
        self.block = keep(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 8, 8) to (B, 5)."""
        x = self.block(F.relu(self.a(x)))
        return self.o(F.relu(self.c(x)).mean((2, 3)))


def run(module: nn.Module, x: Tensor) -> Tensor:
    """A residual."""
    return x + module(x)


def by_default(net: Net) -> Callable[[Tensor], Tensor]:
    """A default argument holds the layer."""

    def block(x: Tensor, layer: nn.Module = net.b) -> Tensor:
        return x + layer(x)

    return block


def by_nested(net: Net) -> Callable[[Tensor], Tensor]:
    """A function holds a function that holds the network."""

    def inner(x: Tensor) -> Tensor:
        return net.b(x)

    return lambda x: x + inner(x)


class Holder:
    """An object that is no module."""

    def __init__(self, net: Net) -> None:
        self.steps = [lambda x: x + net.b(x)]

    def __call__(self, x: Tensor) -> Tensor:
        """Run the first."""
        return self.steps[0](x)


KEPT = {
    "closure": lambda net: lambda x: x + net.b(x),
    "partial": lambda net: functools.partial(run, net.b),
    "default": by_default,
    "nested": by_nested,
    "object": Holder,
    "method": lambda net: functools.partial(run, net.b.forward),
}


@pytest.mark.parametrize("constructed", [True, False])
@pytest.mark.parametrize("name", KEPT)
def test_each_network_runs_its_own_layers(name: str, constructed: bool) -> None:
    """The block's widths are free, its weights are trained, and a change of them is seen."""
    make = functools.partial(Net, KEPT[name])
    space = SearchSpace.from_model(make if constructed else make(), (3, 8, 8))
    assert [axis.name for axis in space.axes] == ["a", "c"]
    one, two = space.build(0.5, seed=1), space.build(0.5, seed=2)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one(x).sum().backward()
    assert all(p.grad is not None for p in one.parameters())
    assert all(p.grad is None for p in two.parameters())
    with torch.no_grad():
        before = one(x)
        one.b.weight.zero_()
        assert not torch.equal(one(x), before)


def test_hooks_over_the_model_are_copied_with_it() -> None:
    """A copy's hook reads the copy's parameter; other functions stay the same objects."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act = nn.Linear(3, 4), F.relu
            self.gain = nn.Parameter(torch.ones(4))
            self.a.register_forward_hook(lambda module, args, out: out * self.gain)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.a(x))

    model = Hooked()
    copied: Any = clone(
        model, {id(t): nn.Parameter(t.detach().clone()) for *_, t in tensors_of(model)}
    )
    with torch.no_grad():
        copied.gain.zero_()
    x = torch.randn(2, 3)
    assert not copied(x).any()
    assert model(x).any()
    assert copied.act is F.relu


def by_weak_reference(net: Net) -> Callable[[Tensor], Tensor]:
    """A weak reference in a container."""
    held = [weakref.ref(net)]
    return lambda x: x + held[0]().b(x)


def by_cache(net: Net) -> Callable[[Tensor], Tensor]:
    """A cache around a closure."""
    return functools.lru_cache(lambda x: x + net.b(x))


@pytest.mark.parametrize(
    ("keep", "how"), [(by_weak_reference, "a weak reference"), (by_cache, "a _lru_cache_wrapper")]
)
def test_what_no_copy_can_hold_is_refused(keep: Callable[[Net], Any], how: str) -> None:
    """The message names the attribute, the module and the way out."""
    with pytest.raises(TraceError) as error:
        SearchSpace.from_model(functools.partial(Net, keep), (3, 8, 8))
    assert str(error.value) == (
        "copies of a model must not run its own modules, but attribute 'block' of module "
        f"'(the model itself)' holds one by {how}: give it the module as an argument, or close "
        "over `self`"
    )


class Scaled(nn.Module):
    """Its constructor sets a function that closes over a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, width), nn.Linear(width, 5)
        self.scale = lambda x: x * width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3) to (N, 5)."""
        return self.b(self.scale(self.a(x)))


def hooked(width: int) -> nn.Module:
    """A function that sets such a hook on a layer."""
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 5))
    model[0].register_forward_hook(lambda module, args, out: out * width**-0.5)
    return model


def patched(width: int) -> nn.Module:
    """A function that replaces a model's forward."""
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 5))
    own = model.forward
    model.forward = lambda x: own(x) * width**-0.5  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("make", "listed"),
    [
        (functools.partial(Scaled, 16), []),
        (Scaled(16), ["'width' of Scaled"]),
        (functools.partial(hooked, 16), ["'0.width' of Linear"]),
        (functools.partial(patched, 16), ["'width' of Sequential"]),
    ],
)
def test_a_number_that_a_function_closes_over(make: Any, listed: list[str]) -> None:
    """It follows the width where a constructor is called anew, and is listed where none is."""
    space = SearchSpace.from_model(make, (3,))
    assert [str(each).partition(" (")[0] for each in space.leftovers] == listed
    for each in space.leftovers:
        assert "test_closures.py:" in str(each) and "stays at the base's 16" in str(each)
    if not listed:
        built, constructed = space.build([8], seed=3), Scaled(8)
        constructed.load_state_dict(built.state_dict())
        x = torch.randn(4, 3)
        assert torch.equal(built(x), constructed(x))


@pytest.mark.parametrize(
    "number",
    [sys.float_info.max, sys.float_info.min, 10**400, math.nan, torch.tensor(1j)],
    ids=["most", "least", "integer", "nan", "complex"],
)
def test_a_number_far_from_any_width_is_none(number: Any) -> None:
    """In a closure or an attribute: its powers are not even finite."""
    model: Any = Scaled(16)
    model.a.register_forward_hook(lambda module, args, out: out if number is None else None)
    model.bias = number
    model.scale = lambda x: x if model.bias is None else 2 * x
    assert SearchSpace.from_model(model, (3,)).leftovers == ()
