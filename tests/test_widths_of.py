"""Widths that are read from the tensors of a network, and networks that others have pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Residual, constrained, refused, space_of, spaces, widths_of
from torch import nn

from widthsearch.errors import WidthsError
from widthsearch.space.search_space import SearchSpace


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_widths_come_back_from_a_network_and_from_its_state_dict(data: st.DataObject) -> None:
    """In the space as it is, and with pins and ties."""
    space = data.draw(spaces)
    space = data.draw(st.just(space) | constrained(space))
    widths = space.widths(data.draw(widths_of(space)))
    network = space.build(widths, initialise=False)
    assert space.widths_of(network) == widths
    assert space.widths_of(network.state_dict()) == widths


def test_a_width_off_the_grid_is_read() -> None:
    """As a width vector that builds, costs and is saved."""
    space = space_of("Residual")
    network = Residual()
    network.conv1 = nn.Conv2d(16, 13, 3, padding=1, bias=False)
    network.bn1 = nn.BatchNorm2d(13)
    network.conv2 = nn.Conv2d(13, 16, 3, padding=1, bias=False)
    found = space.widths_of(network)
    assert found.vector == (16, 13)
    assert space.build(found).conv1.out_channels == 13
    with pytest.raises(WidthsError, match="takes multiples of 4"):
        space.widths(dict(found))


FOREIGN: dict[str, tuple[Any, str]] = {
    "a layer's output alone": (
        {"conv1.weight": torch.zeros(13, 16, 3, 3)},
        "widths must give the shape of every tensor, but 'bn1.weight' has [32], and the widths of "
        "the other tensors give it [13]",
    ),
    "another kernel": (
        {"conv2.weight": torch.zeros(16, 32, 1, 1)},
        "widths must give the shape of every tensor, but 'conv2.weight' has [16, 32, 1, 1], and "
        "the widths of the other tensors give it [16, 32, 3, 3]",
    ),
    "other classes": (
        {"fc.weight": torch.zeros(7, 16)},
        "widths must give the shape of every tensor, but 'fc.weight' has [7, 16], and the widths "
        "of the other tensors give it [10, 16]",
    ),
    "no dims": (
        {"stem.weight": torch.zeros(())},
        "widths must give the shape of every tensor, but 'stem.weight' has [], and the widths of "
        "the other tensors give it [16, 3, 3, 3]",
    ),
    "a layer less": (
        {"fc.bias": None},
        "a network of 'Residual' must have a tensor 'fc.bias': it has none",
    ),
    "a layer more": (
        {"head.bias": torch.zeros(3)},
        "a network of 'Residual' has no tensor 'head.bias': give one of the same code",
    ),
}


def test_a_prefix_of_a_wrapper_is_named() -> None:
    """DataParallel's and torch.compile's."""
    wrapped = nn.DataParallel(Residual()).state_dict()
    message = "'stem.weight': it has 'module.stem.weight': remove the prefix"
    with refused(WidthsError, message, whole=False):
        space_of("Residual").widths_of(wrapped)


@pytest.mark.parametrize("case", FOREIGN)
def test_a_tensor_whose_shape_no_widths_give_is_named(case: str) -> None:
    """In one line."""
    changes, message = FOREIGN[case]
    state = Residual().state_dict() | changes
    with refused(WidthsError, message):
        space_of("Residual").widths_of({k: v for k, v in state.items() if v is not None})


def test_what_holds_no_tensors_by_name_is_refused() -> None:
    """A checkpoint around a state dict, say."""
    space = space_of("Residual")
    with refused(WidthsError, "hold tensors by name, but 'model' is OrderedDict", whole=False):
        space.widths_of({"model": Residual().state_dict()})  # type: ignore[dict-item]
    with refused(WidthsError, "or its state dict, but were to be from PosixPath", whole=False):
        space.widths_of(Path("pruned.pt"))  # type: ignore[arg-type]


def test_groups_stay_whole() -> None:
    """A grouped convolution of 22 channels in groups of 4 is no network of the space."""
    space = space_of("Grouped")
    state = space.build(1.0).state_dict()
    state["grouped.weight"], state["grouped.bias"] = state["grouped.weight"][:22], torch.zeros(22)
    state["last.weight"] = state["last.weight"][:, :22]
    with refused(WidthsError, "but 'grouped.weight' has [22, ", whole=False):
        space.widths_of(state)


def test_a_network_that_breaks_a_constraint_is_refused() -> None:
    """A pin, a tie."""
    network = tiny.space().build([4, 6])
    with refused(
        WidthsError,
        "a pinned axis keeps its base, but 'first' has 4 channels and the base 8: leave the pin "
        "out",
    ):
        tiny.space().constrained(pin="first").widths_of(network)
    with refused(
        WidthsError,
        "tied axes keep their bases' ratio, but 'second' (8) has 6 channels and 'first' (8) has 4: "
        "leave the tie out",
    ):
        tiny.space().constrained(tie=[["first", "second"]]).widths_of(network)


def test_shared_tensors_have_two_names() -> None:
    """A state dict has both, a module one."""

    class Tied(nn.Module):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
            self.two.weight = self.one.weight
            self.stem, self.head = nn.Linear(4, width), nn.Linear(width, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.two(self.one(self.stem(x))))

    space = SearchSpace.from_model(Tied, (4,))
    for network in (Tied(5), Tied(5).state_dict()):
        assert space.widths_of(network).vector == (5,)
