"""Elements, the positions along tensors' dims, and their equivalence classes (union-find).

Notation: an *element* is one position along one symbolic dim of a parameter or buffer, numbered
from 0. A *field* holds the elements that the entries of a tensor depend on: an int64 tensor that is
broadcastable to the tensor's shape, with -1 where there is no element. A field *varies* along the
dims in which it has more than one entry. A tensor has one field per group of dims with elements.

Example: the output of a convolution with four filters, elements 10 to 13, has the field
``[10, 11, 12, 13]`` of shape ``(1, 4, 1, 1)``. Its view as ``(N, 2, 2, H, W)`` has the field
``[[10, 11], [12, 13]]`` of shape ``(1, 2, 2, 1, 1)``. A residual sum with a tensor of the field
``[20, 21, 22, 23]`` unites 10 with 20, 11 with 21, 12 with 22 and 13 with 23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Field = Tensor
"""Elements (int64), broadcastable to the shape of the tensor that they belong to; -1 for none."""


class Elements:
    """A union-find forest: ``parent[i]`` is a smaller element of the same class, or ``i`` itself.

    Attributes:
        parent: The forest.
        log: The unions so far, each with the reason.
        reason: Gives the reason of a union that is made now.

    Example:
        >>> elements = Elements()
        >>> first, second = elements.new(3), elements.new(3)
        >>> elements.unite(torch.from_numpy(first), torch.from_numpy(second))
        >>> elements.find(second).tolist()
        [0, 1, 2]
    """

    def __init__(self) -> None:
        self.parent = np.empty(0, np.int64)
        self.log: list[tuple[NDArray[np.int64], NDArray[np.int64], str]] = []
        self.reason: Callable[[], str] = str

    def new(self, count: int) -> NDArray[np.int64]:
        """Make new elements, each a class of its own."""
        first = len(self.parent)
        made = np.arange(first, first + count, dtype=np.int64)
        self.parent = np.concatenate([self.parent, made])
        return made

    def find(self, elements: NDArray[np.int64]) -> NDArray[np.int64]:
        """The representative of each element's class: its smallest element."""
        while True:
            up = self.parent[elements]
            if (up == elements).all():
                return up
            self.parent[elements] = self.parent[up]  # halves the paths for the next search
            elements = up

    def unite(self, a: Field, b: Field) -> None:
        """Unite the classes of elements at equal positions of two broadcastable fields."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        both = (x >= 0) & (y >= 0)
        x, y = self.find(x[both]), self.find(y[both])
        if (x != y).any():
            self.log.append((x, y, self.reason()))
            self._join(x, y)

    def _join(self, x: NDArray[np.int64], y: NDArray[np.int64]) -> None:
        # One representative may be in several pairs, and gets the smallest of its partners as its
        # parent; the other pairs are still apart and go another round.
        while (apart := x != y).any():
            x, y = x[apart], y[apart]
            np.minimum.at(self.parent, np.maximum(x, y), np.minimum(x, y))
            x, y = self.find(x), self.find(y)

    def cause(self, holds: Callable[[Elements], bool]) -> str:
        """The reason of the first union after which something holds; empty if it holds before."""
        replay = Elements()
        replay.parent = np.arange(len(self.parent))
        found = ""
        for x, y, reason in self.log:
            if holds(replay):
                break
            replay._join(replay.find(x), replay.find(y))
            found = reason
        return found

    def merged(self, fields: Iterable[Field]) -> list[Field]:
        """The fields of a tensor from those of its operands, united at equal positions."""
        out: list[Field] = []
        for f in fields:
            same = [i for i, g in enumerate(out) if varies(g) & varies(f)]
            for i in same:
                self.unite(out[i], f)
            if not same:
                out.append(f)
            else:
                a, b = torch.broadcast_tensors(out[same[0]], f)  # type: ignore[no-untyped-call]
                out[same[0]] = compressed(torch.where(a >= 0, a, b))
        return out

    def collapsed(self, f: Field, dims: set[int]) -> list[Field]:
        """The field after some dims are summed, if its elements along them are one class."""
        first = f
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        roots, of_first = (
            torch.from_numpy(self.find(np.maximum(g.numpy(), 0))) for g in (f, first)
        )
        return [first] if varies(first) and bool((roots == of_first).all()) else []


def hinted(value: Any) -> Any:
    """Symbolic sizes as integers, also in lists and tuples."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if isinstance(value, list | tuple):
        return type(value)(hinted(v) for v in value)
    return value


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's shape in integers."""
    return tuple(hinted(n) for n in tensor.shape)


def compressed(field: Field) -> Field:
    """The field with size 1 along every dim in which it repeats the same elements."""
    for dim in range(field.dim()):
        if field.shape[dim] > 1 and bool((field == field.narrow(dim, 0, 1)).all()):
            field = field.narrow(dim, 0, 1)
    return field


def in_blocks(field: Field, dim: int, count: int) -> Field:
    """The field with a dim divided into that many blocks and the positions in each."""
    return field.reshape(*field.shape[:dim], count, -1, *field.shape[dim + 1 :])


def varies(field: Field) -> set[int]:
    """The dims along which a field varies."""
    return {dim for dim, n in enumerate(field.shape) if n > 1}
