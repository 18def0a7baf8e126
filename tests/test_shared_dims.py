"""Axes that have no dim of their own: channels that always stand beside those of other axes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_constructed import assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.channels.extraction import widths_of
from widthsearch.space.computation import masks_off_cuts, random_channels
from widthsearch.space.search_space import SearchSpace


class DualPath(nn.Module):
    """A residual stream beside one that grows, cut out of one layer, as in a dual path network."""

    def __init__(self, stream: int = 12, grown: int = 4) -> None:
        super().__init__()
        self.stream = stream
        self.stem = nn.Conv2d(3, stream + grown, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(stream + (2 + i) * grown) for i in range(2))
        self.blocks = nn.ModuleList(
            nn.Conv2d(stream + (1 + i) * grown, stream + grown, 3, padding=1) for i in range(2)
        )
        self.fc = nn.Linear(stream + 3 * grown, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 6, 6) to (N, 5)."""
        x = self.stem(x)
        kept, dense = x[:, : self.stream], x[:, self.stream :]
        for block, norm in zip(self.blocks, self.norms, strict=True):
            new = block(torch.cat([kept, dense], 1))
            kept = kept + new[:, : self.stream]
            both = norm(torch.cat([kept, dense, new[:, self.stream :]], 1))
            kept, dense = both[:, : self.stream], both[:, self.stream :]
        return self.fc(both.mean((2, 3)))


class Padded(nn.Module):
    """Zeros on both sides of the channels that a layer's output is added to."""

    def __init__(self, width: int = 14) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 4, 1), nn.Conv2d(4, width, 3, padding=1)
        self.fc = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 5))
        before = (width - 4) // 2
        self.pad = (0, 0, 0, 0, before, width - 4 - before)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 6, 6) to (N, 5)."""
        x = self.stem(x).view(-1, 4, 6, 6)
        return self.fc((self.layer(x) + F.pad(x, self.pad)).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "other", "inputs"),
    [(DualPath, (6, 3), (3, 6, 6)), (Padded, (10,), (3, 6, 6))],
    ids=["cut out", "padded"],
)
def test_channels_of_axes_without_a_dim_of_their_own(
    make: type[nn.Module], other: tuple[int, ...], inputs: tuple[int, ...]
) -> None:
    """All are known, masks equal cuts, and what is built is the class at the same widths."""
    space = SearchSpace.from_model(make, inputs)
    assert not build_dependency_graph(space.model, space.base).unknown
    for seed in range(2):
        keep, _ = random_channels(space, seed)
        assert len(keep) == len(space.axes)
        assert masks_off_cuts(space, keep, seed) < 1e-5
    with torch.random.fork_rng():
        torch.manual_seed(3)
        constructed = make(*other)
    assert_same(
        space.build(widths_of(space.model, constructed), seed=3),
        constructed,
        torch.randn(2, *inputs),
    )


def test_padding_follows_the_class_on_both_sides() -> None:
    """As many zeros before as behind, since no tensor's size tells one number from the other."""
    space = SearchSpace.from_model(Padded, (3, 6, 6))
    assert [axis.base for axis in space.axes] == [5, 6]
    assert space.build([3, 6]).pad[4:] == Padded(10).pad[4:] == (3, 3)


def test_unequal_padding_pins_the_width() -> None:
    """The class has 4 zeros before and 5 behind; if one followed the width, it would differ."""
    space = SearchSpace.from_model(partial(Padded, 13), (3, 6, 6))
    assert space.names == ("fc.0",)
    (reason,) = {pin.reason for pin in space.pinned if pin.name == "layer" and pin.size == 13}
    assert "F.pad(x, self.pad)" in reason
