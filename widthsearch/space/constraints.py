"""Constraints on a space's axes: pins, ties, bounds, steps and alignment.

Pins and ties are substitutions into the trace's polynomials, so costs and shapes stay exact. Bounds
and steps only change the grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

from widthsearch.errors import SpaceError, did_you_mean
from widthsearch.space.ties import joined
from widthsearch.tracing.polynomials import Poly, constant, substitute
from widthsearch.tracing.trace import Pinned, Trace, TracedAxis
from widthsearch.widths import Axis

BLOCKS: Mapping[str, int] = {"cuda": 8, "cpu": 16}
"""Channels that a device's kernels process at a time: 16 bytes of bf16 for tensor cores; the lanes
of AVX-512 in fp32, where a 3×3 convolution of 17 channels takes as long as one of 32."""


@dataclass(frozen=True)
class Constraints:
    """Constraints on axes. Names may be globs (``layer3.*``); each must match an axis.

    In a mapping by axis an exact name overrides globs, and a later glob overrides an earlier one.
    Axes without a match do not change.

    Attributes:
        pin: Axes that are fixed at their base.
        tie: Lists of axes. The axes of a list keep their bases' ratio and become one axis, named
            after the first. A text is a list of all the axes that it matches.
        min: The smallest width: a multiple of the base, or by axis multiples (floats) or
            channels (integers).
        max: The largest width, in the same way.
        step: The distance of two widths in channels, for all axes or by axis. A step for all axes,
            or for a glob, is adapted to each axis's base and to its channels per group. A step for
            a named axis must fit both.
        align: A device, ``cuda`` (steps of 8) or ``cpu`` (16), or a number of channels: the step of
            the axes without a ``step``. It is halved until it fits the base at least twice, so
            that each axis has a narrower width, and lowered if it does not divide the base.
            ``none`` turns off a study's own choice of steps by device (:func:`default_block`).

    Example:
        >>> constraints = Constraints(pin="stem", tie=[["layer1.*", "layer2.*"]], max=1.5)
        >>> constraints.pin, constraints.tie
        (('stem',), (('layer1.*', 'layer2.*'),))
    """

    pin: str | Sequence[str] = ()
    tie: str | Sequence[str | Sequence[str]] = ()
    min: float | Mapping[str, int | float] | None = None
    max: float | Mapping[str, int | float] | None = None
    step: int | Mapping[str, int] | None = None
    align: int | str | None = None

    def __post_init__(self) -> None:
        ties = (entry if isinstance(entry, str) else _listed(entry) for entry in _listed(self.tie))
        object.__setattr__(self, "pin", _listed(self.pin))
        object.__setattr__(self, "tie", tuple(ties))
        for bound in ("min", "max"):
            given = getattr(self, bound)
            for name, value in given.items() if isinstance(given, Mapping) else [("", given)]:
                if value is not None:
                    _check_bound(bound, name, value)
        steps = self.step.values() if isinstance(self.step, Mapping) else [self.step]
        for value in steps:
            if value is not None and not (_whole(value) and value >= 1):
                raise SpaceError(f"`step >= 1` must hold, in whole channels, but step={value!r}")
        whole = _whole(self.align) and int(self.align or 0) >= 1
        if not whole and self.align not in (None, *BLOCKS, "none"):
            raise SpaceError(
                f"`align` must be {', '.join(BLOCKS)}, none or a number of channels, but is "
                f"{self.align!r}"
            )
        if self.align not in (None, "none") and not isinstance(self.step, Mapping | None):
            raise SpaceError(
                f"one step for every axis leaves nothing to align, but step={self.step} and "
                f"align={self.align!r}: leave one out"
            )

    def stepped(self, trace: Trace, axes: Sequence[Axis]) -> frozenset[str]:
        """The names of the axes with a step in these constraints."""
        names = [axis.name for axis in axes]
        if self.align is not None:
            return frozenset(names)
        return frozenset(names[i] for i in _by_axis(self.step, names, trace))

    def apply(
        self,
        trace: Trace,
        axes: Sequence[Axis],
        block: int | None = None,
        stepped: Set[str] = frozenset(),
    ) -> tuple[Trace, tuple[Axis, ...]]:
        """The trace and the axes under these constraints.

        Args:
            trace: The trace before, with its axes in the order of ``axes``.
            axes: The axes before.
            block: The largest :func:`default_step` of axes whose step no user has given.
            stepped: The axes whose step a user has given before.

        Raises:
            SpaceError: A name matches no axis, a bound excludes the base, a step does not fit its
                axis, or no axis is left.
        """
        names = [axis.name for axis in axes]
        gridded = self._gridded(trace, axes, block, stepped)
        pinned = {i for name in _listed(self.pin) for i in matching(name, names, trace)}
        groups = self._groups(names, trace)
        tied: dict[int, list[int]] = {}
        for group in groups:
            for i in group:
                if i in pinned or i in tied:
                    other = "pinned too" if i in pinned else "in another tie too"
                    raise SpaceError(f"an axis is tied once or pinned, but {names[i]!r} is {other}")
                tied[i] = group
        if len(pinned) == len(axes):
            raise SpaceError(f"an axis must be left to search, but all {len(axes)} are pinned")
        kept_traced: list[TracedAxis] = []
        kept: list[Axis] = []
        values: list[Poly] = [{}] * len(axes)
        for i, traced in enumerate(trace.axes):
            group = tied.get(i, [i])
            if i in pinned:
                values[i] = constant(traced.base // traced.divisor)
            elif i == group[0]:
                divisor, axis = joined(
                    [gridded[j] for j in group], [trace.axes[j].divisor for j in group]
                )
                for j in group:  # the variable of j is a multiple of the tied axis's variable
                    width = trace.axes[j].base * divisor // axis.base
                    values[j] = {(len(kept),): width // trace.axes[j].divisor}
                kept.append(axis)
                kept_traced.append(replace(traced, divisor=divisor, layers=axis.layers))
        if not pinned and not groups:
            return trace, tuple(kept)
        by_user = [
            Pinned(axes[i].name, axes[i].base, "pinned by the user", axes[i].layers)
            for i in sorted(pinned)
        ]
        return substituted(trace, kept_traced, by_user, values), tuple(kept)

    def _gridded(
        self, trace: Trace, axes: Sequence[Axis], default: int | None, stepped: Set[str]
    ) -> list[Axis]:
        """Each axis with its new bounds and step."""
        names = [axis.name for axis in axes]
        lows, highs, steps = (
            _by_axis(given, names, trace)
            for given in (_multiple(self.min), _multiple(self.max), self.step)
        )
        block = BLOCKS.get(self.align) if isinstance(self.align, str) else self.align
        stepped = stepped | self.stepped(trace, axes)
        out = []
        for i, (axis, traced) in enumerate(zip(axes, trace.axes, strict=True)):
            step = axis.step
            if i in steps:
                step = math.gcd(math.lcm(traced.divisor, int(steps[i])), axis.base)
                if isinstance(self.step, Mapping) and axis.name in self.step and step != steps[i]:
                    raise _no_step(axis, traced.divisor, steps[i])
            elif block is not None:
                step = aligned_step(axis.base, traced.divisor, int(block))
            elif default is not None and not axis.tied and axis.name not in stepped:
                step = default_step(axis.base, traced.divisor, default)
            low = _channels("min", axis, lows[i]) if i in lows else axis.min_width
            high = _channels("max", axis, highs[i]) if i in highs else axis.max_width
            out.append(axis.on_grid(step, low, high))
        return out

    def _groups(self, names: Sequence[str], trace: Trace) -> list[list[int]]:
        """The axes of each tie, in ascending order."""
        groups = []
        for entry in _listed(self.tie):
            patterns = _listed(entry)
            group = sorted({i for p in patterns for i in matching(p, names, trace)})
            if len(group) < 2:
                found = f"{names[group[0]]!r} alone" if group else "none"
                raise SpaceError(
                    f"a tie takes two axes or more, but {entry!r} is {found}; "
                    "axes that keep their ratio go into one list: tie=[['a', 'b']]"
                )
            groups.append(group)
        return groups


def default_block(device: str) -> int:
    """Channels in a block of a device's kernels: the largest default step there.

    On ``cuda`` 8: 16 bytes of bf16, as tensor cores load them (TF32 needs 4). On a CPU with
    AVX-512 16, the lanes of fp32; bf16 has the same blocks (a 3×3 convolution of 17 channels takes
    1.9 times as long as one of 16). On other CPUs 8, oneDNN's block with AVX2.
    """
    import torch  # here: a study's configuration, with its constraints, is read without torch

    if not device.startswith("cuda") and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return BLOCKS["cpu"]
    return 8


def default_step(base: int, divisor: int = 1, block: int = 8) -> int:
    """The default step of an axis.

    An eighth of the base rounded to a power of two, at most ``block`` (16 channels: 2, 32: 4, 64
    and more: 8): every axis reaches an eighth of its base, and wide axes have whole blocks of the
    device's kernels. It is lowered if it does not divide the base, and a multiple of ``divisor``.
    """
    wanted = min(block, 2 ** max(0, round(math.log2(max(base, 1) / 8))))
    step = divisor
    while step * 2 <= wanted and base % (step * 2) == 0:
        step *= 2
    return step


def default_axis(traced: TracedAxis) -> Axis:
    """An axis with the default grid: the default step, from an eighth to twice the base."""
    base, divisor = traced.base, traced.divisor
    axis = Axis(traced.name, base, divisor, base, divisor, traced.layers)
    return axis.on_grid(default_step(base, divisor), 0.125 * base, 2 * base)


def aligned_step(base: int, divisor: int, block: int) -> int:
    """A step of whole blocks, or of a half, a quarter, … of one where the base is narrow."""
    while block > 1 and 2 * block > base:
        block //= 2
    return math.gcd(math.lcm(divisor, block), base)


def matching(pattern: str, names: Sequence[str], trace: Trace) -> list[int]:
    """The axes that a name or a glob matches.

    Raises:
        SpaceError: There is none; the message has a close match, or the reason of a pin.
    """
    if not isinstance(pattern, str):
        raise SpaceError(f"an axis is given by its name or a glob, but was {pattern!r}")
    found = [i for i, name in enumerate(names) if pattern == name]
    found = found or [i for i, name in enumerate(names) if fnmatchcase(name, pattern)]
    if found:
        return found
    for pin in trace.pinned:
        if fnmatchcase(pin.name, pattern):
            raise SpaceError(
                f"no axis matches {pattern!r}: the width of {pin.name!r} is pinned ({pin.reason})"
            )
    stem = re.split(r"[*?\[]", pattern)[0]
    beginnings = {name[: len(stem)] + pattern[len(stem) :] for name in names}
    globs = sorted(b for b in beginnings if any(fnmatchcase(name, b) for name in names))
    shown = ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")
    hint = did_you_mean(pattern, [*names, *globs], f"the axes are {shown}")
    raise SpaceError(f"no axis matches {pattern!r}; {hint}")


def _listed(given: Any) -> tuple[Any, ...]:
    single = isinstance(given, str) or not isinstance(given, Sequence)
    return (given,) if single else tuple(given)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_bound(bound: str, name: str, value: Any) -> None:
    """Refuse multiples that exclude the base; channels are compared with each axis later."""
    if name and _whole(value) and value >= 1:
        return
    number = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    if not number or not (0 < value <= 1 if bound == "min" else value >= 1):
        rule = "0 < min <= 1" if bound == "min" else "max >= 1"
        where = f" of {name!r}" if name else ""
        channels = ", or whole channels" if name else ""
        raise SpaceError(
            f"`{rule}` must hold (multiples of an axis's base width{channels}), but {bound}{where} "
            f"is {value!r}"
        )


def _channels(bound: str, axis: Axis, value: int | float) -> float:
    """A bound in channels."""
    if not _whole(value):
        return axis.base * float(value)
    if (value > axis.base) if bound == "min" else (value < axis.base):
        relation = "min <= base" if bound == "min" else "max >= base"
        raise SpaceError(
            f"`{relation}` must hold, but axis {axis.name!r} has base={axis.base} and was given "
            f"{bound}={value} channels; a multiple of the base is written {float(value)}"
        )
    return int(value)


def _no_step(axis: Axis, divisor: int, step: int) -> SpaceError:
    fitting = (n for n in range(divisor, axis.base + 1, divisor) if axis.base % n == 0)
    groups = f" in whole groups of {divisor}" if divisor > 1 else ""
    return SpaceError(
        f"a step must divide its axis's base{groups}, but axis {axis.name!r} has base={axis.base} "
        f"and was given step={step}; it can be {', '.join(map(str, fitting))}"
    )


def _multiple(given: Any) -> Any:
    """One bound for every axis as a float: it is a multiple also if it is a whole number."""
    return given if given is None or isinstance(given, Mapping) else float(given)


def _by_axis(given: Any, names: Sequence[str], trace: Trace) -> dict[int, Any]:
    """The value for each axis, as far as there is one."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(range(len(names)), given)
    out: dict[int, Any] = {}
    exactly = {name for name in given if name in names}
    for name in [*(n for n in given if n not in exactly), *exactly]:
        out.update(dict.fromkeys(matching(name, names, trace), given[name]))
    return out


def substituted(
    trace: Trace, axes: Sequence[TracedAxis], pinned: Sequence[Pinned], values: Sequence[Poly]
) -> Trace:
    """The trace with each of its variables replaced by a polynomial over those of ``axes``.

    Args:
        trace: The trace.
        axes: The axes of the new trace.
        pinned: Widths that the substitution pins.
        values: Per variable of the trace, its polynomial.
    """

    def of(poly: Poly) -> Poly:
        return substitute(poly, values.__getitem__)

    return replace(
        trace,
        axes=tuple(axes),
        pinned=(*trace.pinned, *pinned),
        shapes={name: tuple(map(of, shape)) for name, shape in trace.shapes.items()},
        attributes={where: of(poly) for where, poly in trace.attributes.items()},
        macs=of(trace.macs),
        params=of(trace.params),
        activations=of(trace.activations),
        layer_macs={layer: of(poly) for layer, poly in trace.layer_macs.items()},
    )
