"""Widths in the forms that users write them, as width vectors of a space."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from widthsearch.errors import WidthsError, did_you_mean
from widthsearch.tracing.trace import TracedAxis
from widthsearch.widths import Axis, Widths

WidthSpec = float | Mapping[str, int] | Sequence[int]
"""A multiplier of every base width; widths by axis name; or one integer per axis."""
WidthBatch = Widths | Sequence[Widths] | ArrayLike
"""One or many width vectors: :class:`Widths`, or an array of shape (axes,) or (N, axes)."""


def parse_widths(space: str, axes: Sequence[Axis], spec: WidthSpec) -> Widths:
    """The width vector that ``spec`` stands for; see ``SearchSpace.widths``.

    Args:
        space: The space's name, for messages.
        axes: The space's axes.
        spec: The widths.

    Raises:
        WidthsError: The widths do not fit the axes.
    """
    names = tuple(axis.name for axis in axes)
    if isinstance(spec, bool) or spec is None:
        raise WidthsError(f"widths are a multiplier, a mapping or integers, not {spec!r}")
    if isinstance(spec, int | float | np.integer | np.floating):
        if not (math.isfinite(spec) and spec > 0):
            raise WidthsError(f"a width multiplier must be above 0, but is {spec!r}")
        return Widths(names, tuple(axis.nearest(axis.base * float(spec)) for axis in axes))
    if isinstance(spec, Mapping):
        if unknown := [name for name in spec if name not in names]:
            hint = did_you_mean(str(unknown[0]), names, f"its axes are {_listed(names)}")
            raise WidthsError(f"space {space!r} has no axis {unknown[0]!r}; {hint}")
        values: list[Any] = [spec.get(axis.name, axis.base) for axis in axes]
    else:
        values = list(spec)
        if len(values) != len(axes):
            raise WidthsError(
                f"space {space!r} has {len(axes)} axes, but was given {len(values)} widths; its "
                f"axes are {_listed(names)}"
            )
    whole = [int(v) if isinstance(v, np.integer) else v for v in values]
    return Widths(names, tuple(axis.check(v) for axis, v in zip(axes, whole, strict=True)))


def whole_groups(axes: Sequence[Axis], traced: Sequence[TracedAxis]) -> list[Axis]:
    """The axes with every width that is a whole number of groups, whatever their bounds."""
    pairs = zip(axes, traced, strict=True)
    return [axis.on_grid(of_trace.divisor, 1, sys.maxsize) for axis, of_trace in pairs]


def as_vectors(space: str, names: tuple[str, ...], widths: WidthBatch) -> NDArray[np.int64]:
    """One or many width vectors as integers, shape (axes,) or (N, axes); off the grid is allowed.

    Args:
        space: The space's name, for messages.
        names: The names of the space's axes.
        widths: The widths, in channels.

    Raises:
        WidthsError: The widths have another shape, or are not whole numbers from 0 on.
    """

    def vector(one: Any) -> Any:
        if isinstance(one, Widths) and one.names != names:
            raise WidthsError(
                f"widths must be of the axes {_listed(names)} of space {space!r}, but are of "
                f"{', '.join(one.names[:8])}"
            )
        return one.vector if isinstance(one, Widths) else one

    vectors = [vector(w) for w in widths] if isinstance(widths, Sequence) else vector(widths)
    try:
        array = np.asarray(vectors)
    except ValueError:
        raise WidthsError("width vectors must have one length, but have several") from None
    if array.shape == (0,):
        array = np.empty((0, len(names)), np.int64)
    if array.ndim not in (1, 2) or array.shape[-1] != len(names):
        raise WidthsError(
            f"the widths of space {space!r} have shape ({len(names)},) or (N, {len(names)}), but "
            f"were given with shape {array.shape}"
        )
    if array.dtype.kind == "f":
        broken = array[~np.isfinite(array) | (array != np.floor(array))]
        if broken.size:
            raise WidthsError(f"widths must be whole numbers, but one is {broken[0]}")
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise WidthsError(f"widths must be whole numbers, but are of type {array.dtype}")
    if array.size and array.min() < 0:
        raise WidthsError(f"widths must not be negative, but one is {array.min()}")
    return array


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown}, … ({len(names)} in all)"
