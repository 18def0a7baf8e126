"""Hypothesis strategies, small models and counters that several tests share."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Axis

SEARCH_SPACES = Path(__file__).parent.parent / "search_spaces"


class Plain(nn.Module):
    """Two convolutions and a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(torch.flatten(x, 1))


class Residual(nn.Module):
    """A stem and one residual block with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class Concatenated(nn.Module):
    """Two branches, concatenated, normalised and convolved together (as in DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.grow = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 16, 1, bias=False)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(torch.cat([x, self.grow(x)], 1)))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual (as in MobileNetV2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.expand = nn.Conv2d(8, 32, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.project = nn.Conv2d(32, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = self.stem(x)
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.relu6(self.bn2(self.depthwise(y)))
        return self.fc((x + self.bn3(self.project(y))).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution in four groups between two plain ones (as in ResNeXt)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1, bias=False)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.last = nn.Conv2d(24, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


MODELS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (Plain, Residual, Concatenated, Depthwise, Grouped)
}


@cache
def space_of(name: str) -> SearchSpace:
    """The space of one of the small models above."""
    return SearchSpace.from_model(MODELS[name], (3, 8, 8))


def graph_of(space: SearchSpace) -> DependencyGraph:
    """The dependency graph of a space's base."""
    return build_dependency_graph(space.model, space.base)


def network_of(name: str, seed: int = 0) -> tuple[SearchSpace, Any, DependencyGraph]:
    """The space of a small model, its base network, and the dependency graph of the base."""
    space = space_of(name)
    return space, space.build(space.base, seed=seed), graph_of(space)


@contextmanager
def refused(kind: type[Exception], message: str, whole: bool = True) -> Iterator[None]:
    """A context that must raise an error of one line: this message, or one that contains it."""
    with pytest.raises(kind) as error:
        yield
    text = str(error.value)
    assert "\n" not in text
    assert text == message if whole else message in text


spaces = st.sampled_from(sorted(MODELS)).map(space_of)
"""The spaces of the small models."""


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    """Any axis whose bounds lie on its grid."""
    step = draw(st.integers(1, 16))
    least, more, most = sorted(draw(st.tuples(*[st.integers(1, 64)] * 3)))
    return Axis("layer", more * step, least * step, most * step, step)


@st.composite
def widths_of(draw: st.DrawFn, space: SearchSpace) -> tuple[int, ...]:
    """Widths on a space's grid."""
    return tuple(draw(st.sampled_from(axis.grid)) for axis in space.axes)


@st.composite
def constrained(draw: st.DrawFn, space: SearchSpace) -> SearchSpace:
    """The space with some axes pinned and some tied, in any way that leaves one."""
    labels = [draw(st.sampled_from(["free", "pin", "one", "other"])) for _ in space.axes]
    assume(any(label != "pin" for label in labels))
    named = {
        label: [name for name, mine in zip(space.names, labels, strict=True) if mine == label]
        for label in ("pin", "one", "other")
    }
    ties = [named[label] for label in ("one", "other") if len(named[label]) > 1]
    return space.constrained(pin=named["pin"], tie=ties)


def counted_flops(net: nn.Module, input_shape: tuple[int, ...], device: str = "cpu") -> int:
    """Torch's count for one sample."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, *input_shape, device=device))
    return counter.get_total_flops()


def random_widths(space: SearchSpace, seed: int, mixed: int = 3) -> list[list[int]]:
    """Vectors on the grid: one narrower, one wider, and the rest mixed."""
    rng = random.Random(seed)
    return [
        [rng.choice([w for w in axis.grid if within(w, axis.base)]) for axis in space.axes]
        for within in (operator.le, operator.ge, *[lambda _w, _b: True] * mixed)
    ]
