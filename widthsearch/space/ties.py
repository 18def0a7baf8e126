"""Tied axes: several axes that keep their bases' ratio and are searched as one.

Notation: tied axes have the bases ``b_i`` with the greatest common divisor ``g``. At the ratio of
their bases their widths are ``w_i = b_i / g · t`` for a whole number ``t``. Axis i demands that
``w_i`` is a multiple of its divisor (channels per group) and of its step; each demand makes ``t`` a
multiple of some number, and the tied axis needs the least common multiple of all.

Example: 16 and 24 channels have g = 8, so the widths are ``2·t`` and ``3·t``. If the second has
groups of 4, ``t`` is a multiple of 4: the widths are (8, 12), (16, 24), (24, 36), …
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from widthsearch.errors import SpaceError, WidthsError
from widthsearch.widths import Axis, Widths


def joined(axes: Sequence[Axis], divisors: Sequence[int]) -> tuple[int, Axis]:
    """One axis for axes that keep their bases' ratio, and its channels per group.

    Args:
        axes: The axes; the result is named after the first.
        divisors: The channels per group of each.

    Raises:
        SpaceError: No narrower widths keep the ratio.
    """
    first = axes[0]
    if len(axes) == 1:
        return divisors[0], first
    bases = [axis.base for axis in axes]
    g = math.gcd(*bases)

    def multiple_of(demands: Sequence[int]) -> int:  # the multiple that t must be
        return math.lcm(*(n // math.gcd(n, b // g) for n, b in zip(demands, bases, strict=True)))

    names = ", ".join(f"{axis.name!r} ({axis.base})" for axis in axes)
    if multiple_of(divisors) == g and any(d < b for d, b in zip(divisors, bases, strict=True)):
        raise SpaceError(
            f"tied axes must keep their bases' ratio in whole groups, but {names} have no narrower "
            "widths that do: pin one, or leave it out of the tie"
        )
    steps = [axis.step for axis in axes]
    while multiple_of(steps) == g and steps != list(divisors):  # the base alone: halve the steps
        halves = [d * max(1, step // d // 2) for step, d in zip(steps, divisors, strict=True)]
        steps = [math.gcd(half, base) for half, base in zip(halves, bases, strict=True)]
    ratio = first.base // g
    tied = replace(
        first,
        layers=tuple(dict.fromkeys(layer for axis in axes for layer in axis.layers)),
        tied=tuple(name for axis in axes for name in (axis.name, *axis.tied))[1:],
    )
    low = max(axis.min_width * first.base / axis.base for axis in axes)
    high = min(axis.max_width * first.base / axis.base for axis in axes)
    return ratio * multiple_of(divisors), tied.on_grid(ratio * multiple_of(steps), low, high)


def unconstrained_widths(
    axes: Sequence[Axis], unconstrained: Sequence[Axis], widths: Widths
) -> Widths:
    """The widths of the unconstrained axes at widths of pinned and tied ones."""
    owners = {name: axis for axis in axes for name in (axis.name, *axis.tied)}
    vector = []
    for axis in unconstrained:
        owner = owners.get(axis.name)  # None for a pinned axis
        width = axis.base if owner is None else widths[owner.name] * axis.base // owner.base
        vector.append(width)
    return Widths(tuple(axis.name for axis in unconstrained), tuple(vector))


def constrained_widths(
    axes: Sequence[Axis], unconstrained: Sequence[Axis], widths: Widths
) -> Widths:
    """The inverse of :func:`unconstrained_widths`.

    Raises:
        WidthsError: A pinned axis has another width than its base, or tied axes have another ratio
            than their bases.
    """
    owners = {name: axis for axis in axes for name in (axis.name, *axis.tied)}
    found = Widths(tuple(axis.name for axis in axes), tuple(widths[axis.name] for axis in axes))
    for axis in unconstrained:
        owner, width = owners.get(axis.name), widths[axis.name]
        if owner is None and width != axis.base:
            raise WidthsError(
                f"a pinned axis keeps its base, but {axis.name!r} has {width} channels and the "
                f"base {axis.base}: leave the pin out"
            )
        if owner is not None and width * owner.base != found[owner.name] * axis.base:
            raise WidthsError(
                f"tied axes keep their bases' ratio, but {axis.name!r} ({axis.base}) has {width} "
                f"channels and {owner.name!r} ({owner.base}) has {found[owner.name]}: leave the "
                "tie out"
            )
    return found


def tied_scores(
    axes: Sequence[Axis], divisors: Sequence[int], scores: Mapping[str, NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """Scores of the channels of axes, of which some are tied.

    A group of a tied axis is some channels of each of its axes. The lowest-scored go together, and
    each channel of the tied axis carries an equal part of its group's sum.

    Args:
        axes: The axes.
        divisors: Their channels per group.
        scores: One score per channel of every single axis, by name, shape (base,).

    Returns:
        Per axis, shape (base,); an axis without ties keeps its scores.
    """
    out = []
    for axis, divisor in zip(axes, divisors, strict=True):
        of_axis = scores[axis.name]
        if axis.tied:
            groups = axis.base // divisor
            members = [np.sort(scores[name]) for name in (axis.name, *axis.tied)]
            sums = np.sum([m.reshape(groups, -1).sum(1) for m in members], axis=0)
            of_axis = np.repeat(sums / divisor, divisor)
        out.append(of_axis)
    return out
