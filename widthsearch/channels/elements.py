"""Elements: positions along the symbolic dims of tensors, and which of them are one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Field = Tensor
"""Elements (int64) of a tensor, broadcastable to its shape; -1 where there is none."""


class Elements:
    """Elements, and which of them are one (union-find).

    Attributes:
        wandering: Elements whose place depends on the widths.
    """

    def __init__(self) -> None:
        self.parent = np.empty(0, np.int64)
        self.wandering: list[NDArray[np.int64]] = []

    def new(self, count: int) -> NDArray[np.int64]:
        """So many new elements."""
        first = len(self.parent)
        made = np.arange(first, first + count, dtype=np.int64)
        self.parent = np.concatenate([self.parent, made])
        return made

    def find(self, elements: NDArray[np.int64]) -> NDArray[np.int64]:
        """The representative of each element."""
        while True:
            up = self.parent[elements]
            if (up == elements).all():
                return up
            self.parent[elements] = self.parent[up]
            elements = up

    def unite(self, a: Field, b: Field) -> None:
        """Make elements at the same place one; -1 is no element."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        both = (x >= 0) & (y >= 0)
        x, y = self.find(x[both]), self.find(y[both])
        while (apart := x != y).any():
            x, y = x[apart], y[apart]
            np.minimum.at(self.parent, np.maximum(x, y), np.minimum(x, y))
            x, y = self.find(x), self.find(y)


def hinted(value: Any) -> Any:
    """Symbolic sizes as numbers."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if isinstance(value, list | tuple):
        return type(value)(hinted(v) for v in value)
    return value


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's shape in numbers."""
    return tuple(hinted(n) for n in tensor.shape)


def compressed(field: Field) -> Field:
    """The same, with size 1 along every dim on which it does not depend."""
    for dim in range(field.dim()):
        if field.shape[dim] > 1 and bool((field == field.narrow(dim, 0, 1)).all()):
            field = field.narrow(dim, 0, 1)
    return field


def varies(field: Field) -> set[int]:
    """The dims along which a field depends on the position."""
    return {dim for dim, n in enumerate(field.shape) if n > 1}
