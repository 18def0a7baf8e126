"""Axes and widths: plain values, without torch.

An *axis* is one free width of a model. *Widths* are one integer per axis: an architecture. Both are
immutable and compared by content.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from widthsearch.errors import WidthsError
from widthsearch.utils.files import write_atomically


@dataclass(frozen=True)
class Axis:
    """One free width of a model, with the grid of values it may take.

    The grid is ``range(min_width, max_width + 1, step)``; ``base`` and both bounds lie on it.

    Attributes:
        name: The first layer that produces this width, e.g. ``layer1.0.conv1``.
        base: The width in the model as given, in channels.
        min_width: The smallest width allowed, in channels.
        max_width: The largest width allowed, in channels.
        step: The distance of two widths on the grid; every width is a multiple of it.
        layers: Every layer with a parameter or buffer whose shape depends on this axis.
        tied: The axes that a user tied to this one: they keep their bases' ratio to it.

    Example:
        >>> axis = Axis("conv1", base=32, min_width=8, max_width=48, step=8)
        >>> list(axis.grid)
        [8, 16, 24, 32, 40, 48]
        >>> axis.nearest(21.5)
        24
    """

    name: str
    base: int
    min_width: int
    max_width: int
    step: int = 1
    layers: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.step < 1 or self.min_width < 1:
            raise WidthsError(
                f"`step >= 1` and `min_width >= 1` must hold, but axis {self.name!r} has "
                f"step={self.step}, min_width={self.min_width}"
            )
        if not self.min_width <= self.base <= self.max_width:
            raise WidthsError(
                f"`min_width <= base <= max_width` must hold, but axis {self.name!r} has "
                f"min_width={self.min_width}, base={self.base}, max_width={self.max_width}"
            )
        for bound in ("min_width", "base", "max_width"):
            value = getattr(self, bound)
            if value % self.step:
                raise WidthsError(
                    f"`{bound}` must be a multiple of `step`, but axis {self.name!r} has "
                    f"{bound}={value}, step={self.step}"
                )

    @property
    def grid(self) -> range:
        """Every width this axis may take, ascending."""
        return range(self.min_width, self.max_width + 1, self.step)

    def on_grid(self, step: int, low: float, high: float) -> Axis:
        """The axis with another step, and bounds that are moved inwards to the grid."""
        slack = 1e-9  # 0.1 × 30 is 3.0000000000000004
        return replace(
            self,
            step=step,
            min_width=max(step, math.ceil(low / step - slack) * step),
            max_width=max(self.base, math.floor(high / step + slack) * step),
        )

    def nearest(self, width: float) -> int:
        """The grid value nearest to ``width``; the larger one if two are equally near."""
        snapped = math.floor(width / self.step + 0.5) * self.step
        return min(max(snapped, self.min_width), self.max_width)

    def check(self, width: int) -> int:
        """Return ``width`` if it is on the grid.

        Raises:
            WidthsError: It is outside ``min_width .. max_width`` or not a multiple of ``step``.
        """
        if isinstance(width, bool) or not isinstance(width, int):
            raise WidthsError(
                f"a width must be an integer, but axis {self.name!r} was given {width!r}"
            )
        if not self.min_width <= width <= self.max_width:
            least, s = self.min_width, "s" * (self.min_width > 1)
            takes = f"to {self.max_width} channels" if width > least else f"channel{s} or more"
            raise WidthsError(
                f"axis {self.name!r} takes {least} {takes}, but was given {width}; the nearest it "
                f"takes is {self.nearest(width)}"
            )
        if width % self.step:
            raise WidthsError(
                f"axis {self.name!r} takes multiples of {self.step}, but was given {width}; the "
                f"nearest it takes is {self.nearest(width)}"
            )
        return width


def off_grid(axes: Sequence[Axis], widths: Mapping[str, int]) -> str | None:
    """Why widths are off the grid of their axes, by the first of those; None where they are on it.

    Example:
        >>> off_grid([Axis("conv1", base=32, min_width=8, max_width=48, step=8)], {"conv1": 20})
        "axis 'conv1' takes multiples of 8, but was given 20; the nearest it takes is 24"
    """
    try:
        for axis in axes:
            axis.check(widths[axis.name])
    except WidthsError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Widths(Mapping[str, int]):
    """One integer per axis: an architecture. Hashable, ordered like the space's axes.

    Attributes:
        names: The axes' names, in the space's order.
        vector: The width of each axis, in channels, in the same order.

    Example:
        >>> widths = Widths(("conv1", "conv2"), (16, 32))
        >>> widths["conv2"], dict(widths)
        (32, {'conv1': 16, 'conv2': 32})
    """

    names: tuple[str, ...]
    vector: tuple[int, ...]
    _index: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.vector)
        index = {name: i for i, name in enumerate(self.names)}
        object.__setattr__(self, "_index", index)

    def __getitem__(self, name: str) -> int:
        return self.vector[self._index[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __hash__(self) -> int:
        return hash((self.names, self.vector))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Widths):
            return self.names == other.names and self.vector == other.vector
        return NotImplemented

    def __repr__(self) -> str:
        return f"Widths({dict(self)})"

    def to_json(self) -> dict[str, int]:
        """The widths as a plain mapping, in axis order."""
        return dict(self)


def fingerprint(
    name: str, axes: Sequence[Axis], costs: Sequence[Mapping[tuple[int, ...], int]]
) -> str:
    """A short hash of everything that gives a width vector its meaning.

    It covers the space's name, the axes' names, bases and ties, and the cost polynomials, which
    differ between models whose layers have the same names and widths but other kernels or
    resolutions. Bounds and steps are left out: they limit a search, but change no network.

    Args:
        name: The space's name.
        axes: The space's axes.
        costs: Cost polynomials over the axes: the coefficient of each monomial.

    Returns:
        16 hexadecimal digits, the same in every process and Python version.
    """
    # Sorted: the order of a polynomial's terms depends on the order of the model's operations.
    terms = [sorted([*monomial, value] for monomial, value in cost.items()) for cost in costs]
    content = json.dumps([name, [[axis.name, axis.base, *axis.tied] for axis in axes], terms])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# -- files -----------------------------------------------------------------------------------

_KEYS = ("space", "fingerprint", "base", "widths")


def write_widths(
    path: Path, name: str, axes: Sequence[Axis], space_fingerprint: str, widths: Widths
) -> None:
    """Write a width vector as JSON, with its space's name, fingerprint and base widths.

    Args:
        path: The file; an existing file is replaced in one step.
        name: The space's name.
        axes: The space's axes.
        space_fingerprint: The space's :func:`fingerprint`.
        widths: A width vector of the space.
    """
    content = {
        "space": name,
        "fingerprint": space_fingerprint,
        "base": {axis.name: axis.base for axis in axes},
        "widths": widths.to_json(),
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_widths(
    path: Path,
    name: str,
    axes: Sequence[Axis],
    space_fingerprint: str,
    grid: Sequence[Axis] = (),
) -> Widths:
    """Read a width vector that :func:`write_widths` wrote; its widths may be edited by hand.

    Args:
        path: The file.
        name: The name of the space that the widths are for.
        axes: That space's axes, with every width that its networks can have.
        space_fingerprint: That space's :func:`fingerprint`.
        grid: The same axes, with the grid that the widths must be on, if they must.

    Raises:
        WidthsError: The file cannot be read, belongs to another space (the message names the
            first difference), or has a width that is not on the grid.
    """
    content = _read(path)
    base, widths = content["base"], content["widths"]
    for key, value in (("base", base), ("widths", widths)):
        if not isinstance(value, dict):
            raise WidthsError(
                f"`{key}` must be one integer by axis name, but {str(path)!r} has {value!r}"
            )
    if content["fingerprint"] != space_fingerprint:
        raise WidthsError(
            f"widths must be loaded into their own space, but {str(path)!r} is of "
            f"{content['space']!r} ({len(base)} axes) and the space given is {name!r} "
            f"({len(axes)} axes): {_difference(content['space'], base, name, axes)}"
        )
    names = tuple(axis.name for axis in axes)
    for key in widths:
        if key not in names:
            close = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise WidthsError(f"{str(path)!r}: the space has no axis {key!r}{hint}")
    for axis in axes:
        if axis.name not in widths:
            raise WidthsError(
                f"{str(path)!r}: axis {axis.name!r} has no width; its base is {axis.base}"
            )
        try:
            axis.check(widths[axis.name])
        except WidthsError as error:
            raise WidthsError(f"{str(path)!r}: {error}") from None
    if reason := off_grid(grid, widths):
        raise WidthsError(
            f"{str(path)!r}: {reason}, or load it off the grid: load_widths(path, on_grid=False)"
        )
    return Widths(names, tuple(widths[name] for name in names))


def space_in(path: Path) -> str:
    """The name of the space in a file that :func:`write_widths` wrote.

    Raises:
        WidthsError: The file cannot be read.
    """
    return str(_read(path)["space"])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
        raise WidthsError(f"the widths file {str(path)!r} cannot be read: {reason}") from None
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise WidthsError(
            f"a widths file must hold {', '.join(_KEYS)}, but {str(path)!r} has no {missing[0]!r}"
        )
    whole: dict[str, Any] = content
    return whole


def _difference(space: Any, base: Mapping[str, Any], name: str, axes: Sequence[Axis]) -> str:
    """The first difference between a file's space and another space."""
    bases = {axis.name: axis.base for axis in axes}
    for axis in base:
        if axis not in bases:
            return f"it has no axis {axis!r}"
    for axis in bases:
        if axis not in base:
            return f"the file has no axis {axis!r}"
        if base[axis] != bases[axis]:
            return f"the base of axis {axis!r} is {base[axis]} in the file and {bases[axis]} in it"
    if space != name:
        return "their names differ, though their axes are alike"
    if list(base) != list(bases):
        return "their axes are in another order"
    return "other axes are tied to theirs, or the same widths cost something else"
